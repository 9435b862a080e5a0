"""Does a pruned checkpoint compute what the run's hard-masked model computed?

    python eval/check_export.py --run RUN --model DENSE [--python OTHER/bin/python]

The hard-masked, tuned model (weights frozen) is rebuilt here from the dense checkpoint and what
the run found (`RUN/vtrans/`); the pruned one is loaded by `transformers` alone, in a process that
never imports `llm_vtrans`, with another interpreter if one is named. Both in float32, on the same
random tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file

from llm_vtrans.basis.rotation import rotate_model
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.record.masks_file import read_found

LOADER = """
import json, sys
import torch
from safetensors.torch import load_file
import transformers
run, file, auto_class = sys.argv[1:]
saved = load_file(file)
loader = getattr(transformers, auto_class)
model = loader.from_pretrained(run, dtype=torch.float32, trust_remote_code=True)
with torch.no_grad():
    output = model.eval()(saved["tokens"])
logits = output.logits if "logits" in output else torch.stack(list(output.values())[:2], dim=1)
difference = float((logits - saved["logits"]).abs().max() / saved["logits"].abs().max())
assert "llm_vtrans" not in sys.modules
print(json.dumps({"class": type(model).__name__, "difference": difference}))
"""


@torch.no_grad()
def masked_logits(model_name: str, run: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `(batch, seq, vocab)` of the hard-masked model, float32."""
    source = open_source(model_name)
    found = read_found(run, source)
    model = load_model(source, torch.float32, torch.device("cpu"))
    if found.rotation is not None:
        rotate_model(model, source.architecture, found.rotation)
    found.tuning.is_on = True
    masked = MaskedModel(model, source.architecture, found.tuning)
    masked.set_gates(found.plan.hard())
    return masked(tokens)


def main() -> None:
    """Prints the largest logit difference, relative to the largest logit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="result of prune.py")
    parser.add_argument("--model", required=True, help="its dense checkpoint")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that loads the result"
    )
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    vocab_size = json.loads((args.run / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocab_size, (2, 64), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.safetensors"
        save_file({"tokens": tokens, "logits": masked_logits(args.model, args.run, tokens)}, file)
        auto_class = open_source(args.model).auto_class.__name__
        command = [args.python, "-c", LOADER, str(args.run.resolve()), str(file), auto_class]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=folder, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{result['class']}: largest relative logit difference {result['difference']:.2e}")


if __name__ == "__main__":
    main()
