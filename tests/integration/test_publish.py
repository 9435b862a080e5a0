"""verify and publish on a run's result, whole and tampered with in every way."""

import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llm_vtrans.budget.cost import dense_shape, mac_cost
from llm_vtrans.commands.export import export
from llm_vtrans.commands.publish import publish
from llm_vtrans.commands.verify import verify as verify_command
from llm_vtrans.errors import UserError
from llm_vtrans.families import family_for
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.prune import prune
from llm_vtrans.record.masks_file import MASKS_FILE, TUNING_FILE
from llm_vtrans.record.model_card import base_license, front_matter
from llm_vtrans.record.verification import CHECKS, Subject, check_macs, verify
from tests.runs import flags, write_inputs
from tests.tiny import CONFIGS, tiny_model


@pytest.fixture(scope="module", params=["stock", "per-layer"])
def run(request, tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("publish"))
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\nDense.\n")
    prune(flags(folder, "--sparsity", "0.4", "--layout", request.param))
    return folder / "out"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def failed(folder):
    findings = list(verify(Subject.open(folder)))
    return {f.check for f in findings if f.is_failure}


def test_a_whole_checkpoint_holds(run, capsys):
    verify_command([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]


def test_only_the_model_is_taken_for_it(run, capsys):
    """Other engines read every file of this kind in the folder."""
    assert [path.name for path in run.glob("*.safetensors")] == ["model.safetensors"]
    publish([str(run), "--repo", "me/tiny", "--dry-run"])
    listed = capsys.readouterr().out
    assert MASKS_FILE in listed and (run / TUNING_FILE).is_file() and TUNING_FILE not in listed


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_infinite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def widen(folder):  # without rounding: whether perplexity shows that depends on the machine
    tensors = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *path, last = key.split("__")
            part = content
            for step in path:
                part = part[step]
            part[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (change_weight, {"hashes", "perplexity"}),
        (make_infinite, {"hashes", "loads", "perplexity"}),
        (drop_tensor, {"hashes", "shapes", "parameters", "loads", "perplexity"}),
        (widen, {"hashes", "dtype"}),
        (cut_short, {"hashes", "shapes", "dtype", "parameters", "loads", "perplexity"}),
        (lambda folder: (folder / "tokenizer.json").unlink(), {"hashes", "loads", "perplexity"}),
        (lambda folder: save_file({}, folder / "model-extra.safetensors"), {"hashes"}),
        (edit("config.json", hidden_size=12), {"hashes", "shapes", "macs", "loads", "perplexity"}),
        (edit("vtrans.json", macs__after=5), {"macs"}),
        (edit("vtrans.json", params__after=5), {"parameters"}),
        (edit("vtrans.json", perplexity__pruned=3.0), {"perplexity"}),
        (edit("vtrans.json", scores__pruned__perplexity=3.0), {"perplexity"}),  # what tables show
    ],
)
def test_tampering_is_found(copy, tamper, expected):
    tamper(copy)
    assert failed(copy) == expected
    with pytest.raises(UserError, match=r"finding\(s\): do not use this checkpoint"):
        verify_command([str(copy)])


def test_other_text_is_no_verdict(copy, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join("%%%&&&'''(((" * 9 for _ in range(60)))
    findings = {f.check: f for f in verify(Subject.open(copy, str(other)))}
    assert findings["perplexity"].is_skipped and "not the one" in findings["perplexity"].text
    findings = {f.check: f for f in verify(Subject.open(copy, str(tmp_path / "none.txt")))}
    assert findings["perplexity"].is_skipped and "not here" in findings["perplexity"].text


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match="no usable vtrans.json"):
        verify_command([str(tmp_path)])


def test_dry_run_shows_what_would_go(run, capsys):
    scores = run.parent / "scores.json"
    metric = {"higher_is_better": True, "pruned": {"value": 0.5, "stderr": 0.1}}
    content = {"results": {"piqa_local": {"protocol": {}, "metrics": {"acc": metric}}}}
    scores.write_text(json.dumps(content))
    before = (run / "README.md").read_text()
    publish([str(run), "--repo", "me/tiny", "--dry-run", "--scores", str(scores)])
    out = capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "vtrans.json", "recipe.yaml", "report/"):
        assert name in out
    assert "(public)" in out and "nothing was sent" in out
    assert (run / "README.md").read_text() == before
    card = out[out.index("---\n") :]
    assert str(run.parent) not in card  # nobody's folders are published with it
    block = front_matter(card)
    assert block["license"] == "mit" and "base_model" not in block  # a folder is no hub id
    assert {"pruning", "llm-vtrans"} <= set(block["tags"])
    _, results = model_index_to_eval_results(block["model-index"])
    assert [(r.metric_type, r.dataset_name) for r in results] == [
        ("perplexity", "text, held out"), ("acc", "piqa_local"),
    ]  # fmt: skip
    known = ModelCardData(**{k: v for k, v in block.items() if k != "model-index"},
                          model_name="x", eval_results=results)  # fmt: skip
    assert known.to_dict()["model-index"][0]["results"][1]["metrics"][0]["value"] == 0.5


def test_publish_does_not_repeat_a_wrong_perplexity(copy):
    edit("vtrans.json", scores__pruned__perplexity=3.0)(copy)
    with pytest.raises(UserError, match="perplexity: "):
        publish([str(copy), "--repo", "me/tiny", "--dry-run"])


def test_publish_refuses_before_it_sends(copy):
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        publish([str(copy), "--repo", "a b"])
    change_weight(copy)
    with pytest.raises(UserError, match="hashes: model.safetensors has other bytes"):
        publish([str(copy), "--repo", "me/tiny", "--dry-run"])


def test_no_hub_is_one_line(run):  # the tests' environment turns the hub off
    with pytest.raises(UserError, match="the hub did not take it"):
        publish([str(run), "--repo", "me/tiny"])


def test_export_makes_another_size_and_prints_json_alone(run, tmp_path, capsys):
    masks = (run / MASKS_FILE).read_bytes()
    export(["--from", str(run), "--sparsity", "0.2", "--output", str(tmp_path / "o"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(tmp_path / "o") and result["budget"]["achieved"] > 0
    first = json.loads((run / "vtrans.json").read_text())
    assert first["params"]["after"] < result["params"]["after"] <= result["budget"]["target"]
    assert result["layout"] == first["layout"] and "training" not in result["phases"]
    assert not (tmp_path / "o" / "metrics.jsonl").exists()  # nothing was trained
    assert failed(tmp_path / "o") == set()
    assert (run / MASKS_FILE).read_bytes() == masks
    export(["--from", str(run), "--sparsity", "0.2", "--output", str(tmp_path / "q"), "--quiet"])
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="give --sparsity or --params"):
        export(["--from", str(run), "--output", str(tmp_path / "p")])


def test_recipe_repeats_the_run(run):
    settings = json.loads((run / "vtrans.json").read_text())["settings"]
    again = asdict(parse(["--config", str(run / "recipe.yaml")]))
    for key, value in yaml.safe_load((run / "recipe.yaml").read_text()).items():
        assert again[key] == value == settings[key]
    assert {"output", "overwrite", "quiet"}.isdisjoint(
        yaml.safe_load((run / "recipe.yaml").read_text())
    )


def test_report_comes_with_the_run(run):
    html = (run / "report" / "index.html").read_text()
    assert "out: pruning report" in html and "Expected sparsity" in html
    (latency,) = json.loads((run / "vtrans.json").read_text())["latency"].values()
    assert 0 < latency["dense"] < 1000 and 0 < latency["pruned"] < 1000
    assert "latency, ms for 16 tokens" in html


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: a\nlicense_link: x\n---\n", {}, {"license": "a", "license_link": "x"}),
        ("no block", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: [\n---\n", {}, {}),
        (None, {}, {}),
    ],
)  # fmt: skip
def test_licence_of_the_base(tmp_path, card, config, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_license(tmp_path, config) == expected


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("padding", [None, 0])
def test_macs_are_counted_whether_padding_has_a_token(name: str, padding: int | None) -> None:
    model = tiny_model(name)
    config = model.config
    config.architectures = [type(model).__name__]
    if padding is not None or config.model_type != "roberta":  # which counts positions by it
        config.pad_token_id = padding
    architecture = family_for(config.model_type).describe(config)
    macs = mac_cost(architecture, 8).of(dense_shape(architecture))
    task = "multiple-choice" if name.endswith("choose") else "clm"
    manifest = {"macs": {"after": macs, "seq_len": 8}, "budget": {"kind": "params"}, "task": task}
    assert [*check_macs(cast(Subject, SimpleNamespace(manifest=manifest, config=config)))] == []


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "linear"])
def test_macs_are_counted_for_every_rotary_embedding(kind: str) -> None:
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.rope_parameters = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    architecture = family_for("llama").describe(config)
    macs = {"after": mac_cost(architecture, 8).of(dense_shape(architecture)), "seq_len": 8}
    manifest = {"macs": macs, "budget": {"kind": "params"}}
    assert [*check_macs(cast(Subject, SimpleNamespace(manifest=manifest, config=config)))] == []


def test_a_dense_checkpoint_of_odd_parts_holds_when_it_is_pruned(tmp_path):
    """Norms of another dtype, an old buffer, and a padding token that the model has no row for."""
    folder = write_inputs(tmp_path)
    path = folder / "model" / "model.safetensors"
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(path).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2, dtype=torch.float16)
    save_file(tensors, path, {"format": "pt"})
    edit("config.json", dtype="bfloat16")(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder / "model")
    prune(flags(folder, "--sparsity", "0.4"))
    assert failed(folder / "out") == set()


def test_an_old_buffer_does_not_decide_what_dtype_is_stated(tmp_path):
    folder = write_inputs(tmp_path)
    path = folder / "model" / "model.safetensors"
    tensors = {n: t.bfloat16() for n, t in load_file(path).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path, {"format": "pt"})
    edit("config.json", dtype="float32")(folder / "model")
    prune(flags(folder, "--sparsity", "0.4"))
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"
