r"""Score a checkpoint beside its dense baseline: perplexity, LM Evaluation Harness.

    llm-vtrans score --model DIR --baseline DENSE \
        --tasks ppl:wikitext2 wikitext_local piqa_local --output results.json

`accelerate launch eval/score.py` is the same on several ranks.

Prints one table and writes everything to the JSON file. A standard error follows each
value; that of a difference is paired: both models are scored on the same documents.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_vtrans.commands.command import Parser, is_rank_zero, positive
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import auto_class_of
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.scoring.perplexity import Estimate, text_documents, text_windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from llm_vtrans.scoring.harness import HarnessTasks, Score

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
# A wheel carries the task files inside the package; a checkout has them in eval/.
TASKS_DIR = CHECKOUT / "eval" / "tasks"
if (PACKAGE / "harness_tasks").is_dir():
    TASKS_DIR = PACKAGE / "harness_tasks"
# The task files name their data relative to a checkout with shared/ beside it.
DATA_DIR = (
    Path("../shared/data") if TASKS_DIR.parent == PACKAGE else CHECKOUT.parent / "shared/data"
)

VERSIONED = ("torch", "transformers", "lm_eval", "datasets", "accelerate", "tokenizers")
HARNESS_MAX_LENGTH = 2048  # the harness's own, for configs that state no longest sequence

TASKS_HELP = (
    "ppl:wikitext2, ppl:general, ppl:embedded, ppl:FILE.txt (token-level perplexity); *_local and "
    "embedded_heldout (offline, eval/tasks); or any name of the harness"
)
DATA_DIR_HELP = "folder of the offline tasks' data (default: %(default)s)"
DTYPE_HELP = "auto, the default, is float32 on CPU, else the checkpoint's own"

Rows = dict[tuple[str, str], "Score"]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check what needs no file."""
    parser = Parser(
        prog="llm-vtrans score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint: folder, hub name or embedded")
    add("--baseline", help="dense checkpoint to compare it with")
    add("--tasks", required=True, nargs="+", metavar="TASK", help=TASKS_HELP)
    add("--data-dir", type=Path, default=DATA_DIR, help=DATA_DIR_HELP)
    add("--batch-size", type=positive, default=8, help="sequences per rank (default: 8)")
    add("--limit", type=positive, help="documents or windows per task; for trials only")
    add("--context-length", type=positive, default=256, help="tokens in a window of ppl: tasks")
    add("--max-length", type=positive, help="longest harness sequence, in tokens (models' own)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=DTYPE_HELP)
    add("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")
    add("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    args.tasks = list(dict.fromkeys(name for t in args.tasks for name in t.split(",") if name))
    if not args.tasks:
        raise UserError("--tasks names no task; see --help")
    if args.context_length < 2:
        raise UserError("--context-length must be at least 2: a window's first token is not scored")
    return args


def check_output(path: Path) -> None:
    """Find out now, not after hours, that the results can be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


def read_config(checkpoint: str, trust_remote_code: bool) -> PretrainedConfig:
    """Read a checkpoint's config, which tells early whether it can be scored.

    Raises:
        UserError: there is none, or none of a causal language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no usable checkpoint at {checkpoint}: {reason}") from error
    names = getattr(config, "architectures", None) or ()
    # Others would be loaded, with a head of random numbers in place of their own.
    if names and not (
        names[0].endswith("ForConditionalGeneration")  # text with pictures
        or "AutoModelForCausalLM"
        in (auto_class_of(names[0]), *(getattr(config, "auto_map", None) or ()))
    ):
        raise UserError(
            f"{checkpoint}: holds a {names[0]}, no causal language model; vtrans.json states the "
            "scores of other tasks, before and after"
        )
    return config


def common_max_length(args: argparse.Namespace, models: dict[str, str]) -> int:
    """Return the longest sequence that all the models take, in tokens."""
    configs = [read_config(model, args.trust_remote_code) for model in models.values()]
    longest = min(getattr(c, "max_position_embeddings", HARNESS_MAX_LENGTH) for c in configs)
    for flag in ("context_length", "max_length"):
        if (getattr(args, flag) or 0) > longest:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)} is more than the models' "
                f"{longest} positions"
            )
    return args.max_length or longest


def cut_texts(
    args: argparse.Namespace, models: dict[str, str], texts: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Cut the `ppl:` texts into windows, `(num_windows, context_length)`, alike for all models."""
    from transformers import AutoTokenizer

    windows: dict[str, Tensor] = {}
    for checkpoint in models.values() if texts else ():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint, trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{checkpoint} holds no usable tokenizer") from error
        for name, documents in texts.items():
            cut = text_windows(tokenizer, documents, args.context_length, args.limit)
            if not windows.setdefault(name, cut).equal(cut):
                raise UserError(
                    f"{name}: --model and --baseline tokenise differently, so their token-level "
                    "perplexities cannot be compared: use wikitext_local (word and byte level)"
                )
    return windows


def score_model(
    checkpoint: str,
    args: argparse.Namespace,
    max_length: int,
    windows: dict[str, Tensor],
    texts: dict[str, list[str]],
    tasks: HarnessTasks | None,
) -> Rows:
    """Score one checkpoint on every task; the rows are empty on ranks other than 0."""
    import torch

    from llm_vtrans.scoring.harness import load_model, run_perplexity, run_tasks

    lm = load_model(checkpoint, args.batch_size, args.dtype, max_length, args.trust_remote_code)
    scores = [
        score
        for name, cut in windows.items()
        for score in run_perplexity(lm, name, cut, len(texts[name]))
    ]
    if tasks is not None:
        scores += run_tasks(lm, tasks, args.limit)
    del lm
    gc.collect()
    torch.cuda.empty_cache()
    return {(score.task, score.metric): score for score in scores}


def with_differences(rows: dict[str, Rows]) -> dict[str, dict[tuple[str, str], Estimate]]:
    """Return the table's columns: one per model, then pruned minus dense."""
    columns = {
        label: {key: score.estimate for key, score in scores.items()}
        for label, scores in rows.items()
    }
    if "dense" in columns:
        pruned, dense = columns["pruned"], columns["dense"]
        columns["difference"] = {key: pruned[key].minus(dense[key]) for key in pruned}
    return columns


def render(estimate: Estimate, sign: str = "") -> str:
    """Print a value to two digits of its standard error."""
    stderr = estimate.stderr
    known = math.isfinite(stderr) and stderr > 0
    decimals = min(max(1 - math.floor(math.log10(stderr)), 0), 6) if known else 4
    error = f"{stderr:.{decimals}f}" if math.isfinite(stderr) else "n/a"
    return f"{estimate.value:{sign}.{decimals}f} ± {error}"


def describe(protocol: dict[str, str | int]) -> str:
    """Print a protocol in one cell."""
    return "; ".join(
        value if isinstance(value, str) else f"{key.removeprefix('num_')} {value}"
        for key, value in protocol.items()
    )


def table(rows: dict[str, Rows], columns: dict[str, dict[tuple[str, str], Estimate]]) -> str:
    """Lay out the results: one line per task and metric."""
    scores = next(iter(rows.values()))
    lines = [["task", "metric", *columns, "protocol"]]
    for key, score in scores.items():
        cells = [render(c[key], "+" if n == "difference" else "") for n, c in columns.items()]
        lines.append([*key, *cells, describe(score.protocol)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def record(
    args: argparse.Namespace,
    rows: dict[str, Rows],
    columns: dict[str, dict[tuple[str, str], Estimate]],
) -> dict[str, Any]:
    """Gather everything that the JSON file keeps."""

    def finite(number: float) -> float | None:
        return number if math.isfinite(number) else None  # JSON knows no NaN

    results: dict[str, dict[str, Any]] = {}
    for key, score in next(iter(rows.values())).items():
        task = results.setdefault(score.task, {"protocol": score.protocol, "metrics": {}})
        task["metrics"][score.metric] = {"higher_is_better": score.higher_is_better} | {
            name: {"value": finite(c[key].value), "stderr": finite(c[key].stderr)}
            for name, c in columns.items()
        }
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {
        "settings": settings | {"num_processes": int(os.environ.get("WORLD_SIZE", "1"))},
        "versions": {"python": platform.python_version()} | versions,
        "results": results,
    }


def run(arguments: list[str]) -> None:
    """Check everything, then score the models in turn, then report on rank 0."""
    args = parse(arguments)
    models = {"dense": args.baseline, "pruned": args.model}
    models = models if args.baseline else {"model": args.model}
    models = {k: str(EMBEDDED_MODEL) if m == "embedded" else m for k, m in models.items()}
    check_output(args.output)
    ppl_names = [name for name in args.tasks if name.startswith("ppl:")]
    texts = {name: text_documents(name[len("ppl:") :], args.data_dir) for name in ppl_names}
    max_length = common_max_length(args, models)
    windows = cut_texts(args, models, texts)

    from llm_vtrans.scoring.harness import load_tasks  # now, for it takes seconds to import

    names = [name for name in args.tasks if name not in texts]
    tasks = load_tasks(names, TASKS_DIR, args.data_dir, args.limit) if names else None
    rows = {
        label: score_model(checkpoint, args, max_length, windows, texts, tasks)
        for label, checkpoint in models.items()
    }
    if is_rank_zero():
        columns = with_differences(rows)
        print(table(rows, columns))
        content = record(args, rows, columns)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(args.output, text + "\n")
