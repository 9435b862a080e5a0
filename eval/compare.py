r"""Compare methods of structured pruning at the same budget: one table, one plot per metric.

    python eval/compare.py --model M --data D --sparsity 0.2 0.35 0.5 0.7 --methods all \
        --output report/ [--seeds 0 1 2] [--layout both] [--recover none least-squares lora] \
        [--processes 2]

Every method has the same groups, calibration windows and budget over ALL parameters, is
exported by the same code and scored by the same protocol, with hyperparameters that are the
same for every model and budget. One-shot selections look at the first 160 windows, `ours` trains
on all. It is the product's own job; its results stay in `OUTPUT/ours`. Every cell (method,
sparsity, layout, recovery, seed) runs in a process of its own and leaves one file in
`OUTPUT/cells`: a rerun computes what is missing, and a cell that dies leaves the others alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of eval/: the checkout need not be installed

from safetensors.torch import save
from torch import Tensor

from eval.baselines import BASELINES
from eval.comparison import plots, report
from eval.comparison.ablations import ABLATIONS
from eval.comparison.cell import (
    CHOICE_WINDOWS,
    DENSE,
    NO_RECOVERY,
    OURS,
    SCRATCH_PREFIX,
    SELECTION_WINDOWS,
    Cell,
    Settings,
    method_of,
    windows_file,
)
from eval.comparison.overlap import check_apart
from eval.comparison.processes import compute
from llm_vtrans.calibration.text import TextSource, calibrate
from llm_vtrans.commands.command import Parser, positive, run_command
from llm_vtrans.errors import UserError
from llm_vtrans.loading.source import EMBEDDED, Source, load_tokenizer, open_source
from llm_vtrans.record.output_folder import atomic_write_bytes
from llm_vtrans.recovery.methods import recovery_for
from llm_vtrans.scoring.perplexity import text_documents, text_windows

NAMED = "all, baselines, ablations"  # groups of methods


def share(text: str) -> float:
    """Parses a sparsity."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1), got {text!r}")
    return value


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses and checks what needs no file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    groups = {"all": [*BASELINES, OURS], "baselines": [*BASELINES], "ablations": [*ABLATIONS]}
    methods = [*groups["all"], *groups["ablations"]]
    add("--model", default=EMBEDDED, help="dense checkpoint: folder, hub name or embedded")
    add("--data", help="calibration text, as prune's --data (embedded or wikitext2)")
    add("--texts", nargs="+", help="evaluation texts: wikitext2, general, embedded or FILE.txt")
    add("--tasks", nargs="*", default=[], help="zero-shot tasks, as score.py's --tasks")
    add("--sparsity", nargs="+", type=share, default=[0.2, 0.35, 0.5, 0.7], help="removed shares")
    add("--methods", nargs="+", default=["all"], help=f"{NAMED}, or of {', '.join(methods)}")
    add("--seeds", nargs="+", type=int, default=[0], help="of calibration, draws and training")
    add("--layout", choices=("stock", "per-layer", "both"), default="stock", help="shape of layers")
    add("--recover", nargs="+", default=[NO_RECOVERY], help="none, or as prune's --recover")
    add("--samples", type=positive, default=2400, help="calibration windows (default: 2400)")
    add("--context-length", type=positive, default=256, help="tokens in a window, of both kinds")
    add("--limit", type=positive, help="windows per text, documents per task; for trials only")
    add("--data-dir", type=Path, default=ROOT.parent / "shared" / "data", help="of named texts")
    add("--processes", type=positive, default=1, help="cells at a time; on a GPU they share it")
    add("--output", type=Path, required=True, help="folder of the report; a rerun continues it")
    args = parser.parse_args(argv)
    if args.samples < SELECTION_WINDOWS + CHOICE_WINDOWS:
        raise UserError(
            f"--samples must be at least {SELECTION_WINDOWS + CHOICE_WINDOWS}, the number that "
            f"one-shot methods see, got {args.samples}"
        )
    args.methods = [name for given in args.methods for name in groups.get(given, [given])]
    for name in ("methods", "sparsity", "seeds", "recover"):  # a cell is computed once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if unknown := [name for name in args.methods if name not in methods]:
        raise UserError(f"--methods {unknown[0]}: choose {NAMED}, or of {', '.join(methods)}")
    for name in args.recover:
        if name != NO_RECOVERY:
            recovery_for(name).check()
    is_embedded = args.model == EMBEDDED
    args.data = args.data or (EMBEDDED if is_embedded else "wikitext2")
    args.texts = args.texts or ([EMBEDDED] if is_embedded else ["wikitext2", "general"])
    return args


def make_settings(args: argparse.Namespace, source: Source) -> Settings:
    """What all cells share.

    Raises:
        UserError: windows longer than the model's context.
    """
    longest = source.architecture.max_positions
    if not 2 <= args.context_length <= longest:
        raise UserError(
            f"--context-length must be between 2 and the model's {longest} positions, "
            f"got {args.context_length}"
        )
    return Settings(
        args.model, args.data, args.samples, args.context_length, args.context_length,
        tuple(args.texts), tuple(args.tasks), str(args.data_dir), args.limit,
        str(args.output.resolve()),
    )  # fmt: skip


def prepare_windows(settings: Settings, source: Source, seed: int) -> str:
    """Tokenises calibration and evaluation text, keeps the windows, and returns their hash.

    Raises:
        UserError: text that cannot be read, or that both have in common.
    """
    tokenizer = load_tokenizer(source)
    texts = {
        name: text_windows(
            tokenizer, text_documents(name, Path(settings.data_dir)), settings.context_length,
            settings.limit,
        )
        for name in settings.texts
    }  # fmt: skip
    data = calibrate(TextSource(settings.data), tokenizer, settings.samples, settings.seq_len, seed)
    for name, windows in texts.items():
        check_apart(name, windows, settings.data, data.train)
    tensors: dict[str, Tensor] = {"train": data.train, **texts}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()[:16]
    file = windows_file(settings, digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, content)
    return digest


def plan_cells(args: argparse.Namespace, settings: Settings, source: Source) -> Iterator[Cell]:
    """Every cell, dense first; methods that are alike in both layouts run in one."""
    checkpoint = source.checkpoint.sha256
    inputs = {seed: prepare_windows(settings, source, seed) for seed in args.seeds}
    layouts = ["stock", "per-layer"] if args.layout == "both" else [args.layout]
    for seed, digest in inputs.items():
        yield Cell(DENSE, 0.0, "-", NO_RECOVERY, seed, checkpoint, digest)
    for name in args.methods:
        method = method_of(name, settings)
        for recovery in args.recover:
            if not (recovery == NO_RECOVERY or method.is_plain or is_general(recovery)):
                continue  # its function is no plain network that this recovery knows
            for layout in layouts[:1] if method.is_uniform else layouts:
                for sparsity in args.sparsity:
                    for seed, digest in inputs.items():
                        yield Cell(name, sparsity, layout, recovery, seed, checkpoint, digest)


def is_general(recovery: str) -> bool:
    """Whether a recovery works on any network."""
    return recovery_for(recovery).IS_GENERAL


def protocol(settings: Settings, cells: list[Cell]) -> str:
    """States how the figures came about."""
    from safetensors import safe_open

    with safe_open(windows_file(settings, cells[0].inputs), framework="pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in settings.texts}
    texts = ", ".join(
        f"{name} {shape[0] * (shape[1] - 1):,} tokens predicted" for name, shape in sizes.items()
    )
    return (
        f"Token-level perplexity over non-overlapping windows of {settings.context_length} tokens "
        f"without special tokens: {texts}. `excess`: nats per token over the dense model. "
        f"Calibration: {settings.data}, windows of {settings.seq_len} tokens that share no run of "
        "half a window with the evaluation texts. Parameters: all of them, embeddings and head "
        "included. Seconds: from loading the dense model to the pruned one, a shared training "
        "included. Peak: resident memory of the cell's process, libraries and scoring included. "
        "Figures are means over seeds ± sample standard deviation."
    )


def run(arguments: list[str]) -> None:
    """Checks everything, computes what is missing, writes and prints the report."""
    args = parse(arguments)
    source = open_source(args.model)
    settings = make_settings(args, source)
    args.output.mkdir(parents=True, exist_ok=True)
    for left in args.output.glob(f"{SCRATCH_PREFIX}*"):  # by a cell that was killed
        shutil.rmtree(left, ignore_errors=True)
    if not plots.is_available():
        print("no plots: pip install -e '.[eval]' brings matplotlib", file=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cells fork
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the fork server imports from it
    cells = list(plan_cells(args, settings, source))
    failures = {
        (cell.method, cell.sparsity, cell.layout, cell.recovery): failure
        for cell, failure in compute(cells, settings, args.processes).items()
    }
    files = [file for cell in cells if (file := cell.file(settings)).is_file()]
    rows = report.make_rows((json.loads(file.read_text()) for file in files), failures)
    stated = protocol(settings, cells)
    report.write(rows, stated, asdict(settings), args.output)
    if plots.is_available():
        plots.plot(rows, args.output)
    print(report.markdown(rows, stated))
    if failures:
        raise UserError(f"{len(failures)} entries failed (see their notes); run again to retry")


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
