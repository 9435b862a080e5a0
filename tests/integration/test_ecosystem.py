"""Other programs on a pruned checkpoint, the real ones: `pytest -m ecosystem`.

They need the extra `ecosystem`; each test skips where its program is missing. ONNX is not
here: optimum-onnx 0.1.0, the newest, asks for transformers < 4.58.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import llm_vtrans  # noqa: F401  # makes the per-layer layout loadable
from tests.runs import ENTRY, ROOT

pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(900)]
PROMPT = "The president said that the"
NUM_NEW = 16


@pytest.fixture(scope="module", params=["stock", "per-layer"])
def run(request, tmp_path_factory):
    """The embedded model, pruned by a short training."""
    folder = tmp_path_factory.mktemp("ecosystem") / "run"
    subprocess.run(
        [sys.executable, ENTRY, "--samples", "64", "--seq-len", "128", "--sparsity", "0.4",
         "--layout", request.param, "--output", str(folder)],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder


def loaded(folder, **more):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def greedy(folder, **more):
    """Ids of the prompt and of its greedy continuation."""
    model, tokenizer = loaded(folder)
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(ids, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False,
                         pad_token_id=0, **more)  # fmt: skip
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist(), tokenizer


def test_pipeline_and_caches(run):
    _, dynamic, tokenizer = greedy(run)
    assert greedy(run, use_cache=False)[1] == dynamic
    assert greedy(run, cache_implementation="static", disable_compile=True)[1] == dynamic
    model, _ = loaded(run)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate(PROMPT, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith(PROMPT)


def test_peft_lora_attaches_and_merges(run):
    peft = pytest.importorskip("peft")
    model, tokenizer = loaded(run)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    before = model(ids).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    changed = adapted(ids).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, changed, atol=1e-3, rtol=1e-3)


def test_bitsandbytes_loads_in_4_bit(run):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model, tokenizer = loaded(
        run, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        exact = loaded(run)[0](ids).logits.flatten()
        low = model(ids.to(model.device)).logits.float().cpu().flatten()
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__ == "Linear4bit"
    assert torch.cosine_similarity(exact, low, dim=0) > 0.9


def test_unmodified_lm_eval(run, tmp_path):
    code = "import llm_vtrans, sys; from lm_eval.__main__ import cli_evaluate as c; sys.exit(c())"
    command = [sys.executable, "-c", code] if "per_layer" in config_type(run) else [
        sys.executable, "-m", "lm_eval"
    ]  # fmt: skip
    subprocess.run(
        [*command, "--model", "hf", "--model_args", f"pretrained={run},dtype=float32",
         "--include_path", str(ROOT / "eval" / "tasks"), "--tasks", "embedded_heldout",
         "--limit", "2", "--device", "cpu", "--output_path", str(tmp_path / "out")],
        cwd=ROOT, check=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    (result,) = Path(tmp_path / "out").rglob("results_*.json")
    found = json.loads(result.read_text())["results"]["embedded_heldout"]
    assert found["word_perplexity,none"] > 1


def config_type(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 128, False
params.cpuparams.n_threads = 1
request = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "temperature": 0,
           "top_k": 1, "ignore_eos": True}
answer = xllamacpp.Server(params).handle_completions(request)
answer = json.loads(answer) if isinstance(answer, str) else answer
print("TEXT" + json.dumps(answer["choices"][0]["text"]))
"""


def test_a_token_that_the_model_has_no_row_for_is_left_out(run, tmp_path):
    """Such as one for padding that was added, which no GGUF could hold."""
    gguf = pytest.importorskip("gguf")
    from llm_vtrans.convert.command import convert

    folder, path = shutil.copytree(run, tmp_path / "run"), tmp_path / "model.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == size
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    convert(["gguf", str(folder), "--output", str(path)])
    fields = gguf.GGUFReader(path).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == size
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_llama_cpp_gives_the_same_greedy_tokens(run, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from llm_vtrans.convert.command import convert

    path = tmp_path / "model.gguf"
    convert(["gguf", str(run), "--dtype", "float32", "--output", str(path)])
    prompt, expected, tokenizer = greedy(run, eos_token_id=None)
    result = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, str(path), json.dumps(prompt), str(NUM_NEW)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("TEXT")]
    assert json.loads(line[4:]) == tokenizer.decode(expected, skip_special_tokens=True)
