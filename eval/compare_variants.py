r"""Variants of the method beside selections without training, on one task at the same budgets.

    python eval/compare_variants.py --model DIR --data FILE --sparsity 0.6 0.9 --output DIR \
        [--methods vtrans fast faster random magnitude] [--task T --finetune-first true ...]

Options that are not listed by --help go to every run of `prune`. Variants are the product's
own job. The selections rank units once, take the hidden size that loses least, and share all
the rest with it: budget, layout, heads' basis, export, scoring. Results are kept in OUTPUT,
so a rerun computes what is missing. Speed is measured at the end, one model after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of eval/: the checkout need not be installed

import torch

from eval.baselines.magnitude import importance as magnitude
from eval.baselines.network import Importances, Network
from eval.baselines.random_units import importance as random_units
from eval.baselines.ranking import uniform_ranks
from eval.baselines.selection import hidden_sizes
from llm_vtrans.allocation.allocate import Allocator
from llm_vtrans.arguments import VARIANTS, PruneArguments
from llm_vtrans.budget.problem import TOLERANCE
from llm_vtrans.commands.command import Parser, run_command
from llm_vtrans.errors import UserError
from llm_vtrans.families import Axis
from llm_vtrans.job import Job
from llm_vtrans.loading.source import Source, open_source
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.preparation.planning import task_data, window_length
from llm_vtrans.prune import prune
from llm_vtrans.record.output_folder import MANIFEST_FILE, atomic_write_text
from llm_vtrans.record.reporting import table
from llm_vtrans.tasks import Task
from llm_vtrans.tasks.encoding import inputs_of
from llm_vtrans.tasks.finetuning import finetune_first
from llm_vtrans.timing.latency import forward_ms
from llm_vtrans.training.preemption import Preemption

SELECTIONS: dict[str, Callable[[Network, int], Importances]] = {
    "random": random_units,
    "magnitude": magnitude,
}
BATCH_SIZES = (1, 32)
ONLY_SCORED = ("load", "calibration", "score", "export")  # phases that every method has


@dataclass(frozen=True)
class Result:
    """One row: a model on disk, and how it came about.

    Attributes:
        method: `dense`, a variant or a selection.
        sparsity: removed share that was asked for.
        folder: of the checkpoint.
        manifest: of its run; for the dense model that of any run.
    """

    method: str
    sparsity: float
    folder: Path
    manifest: dict[str, Any]

    @property
    def _side(self) -> str:
        return "before" if self.method == "dense" else "after"

    @property
    def score(self) -> float:
        """The task's headline score."""
        scores = self.manifest["scores"]["dense" if self.method == "dense" else "pruned"]
        return float(scores[self.manifest["headline"]])

    @property
    def seconds(self) -> float:
        """What the method took beside loading, exporting and scoring."""
        if self.method == "dense":
            return 0.0
        phases = self.manifest["phases"].items()
        return sum(phase["seconds"] for name, phase in phases if name not in ONLY_SCORED)

    def count(self, key: str) -> int:
        """`params` or `macs`."""
        return int(self.manifest[key][self._side])


def select(arguments: list[str], importance: Callable[[Network, int], Importances]) -> None:
    """Prunes by a ranking of units, with the product's stages around it.

    Raises:
        UserError: the budget is out of reach, or a file cannot be used.
    """
    job = Job.prepare(parse(arguments), Preemption())
    job.load()
    network = Network(
        job.source, job.masked.model, job.architecture, torch.empty(0, dtype=torch.long)
    )
    chosen = importance(network, job.args.seed)
    (scores,) = uniform_ranks({name: chosen[name] for name in job.args.structures()
                               if name in chosen}, job.architecture.num_layers)  # fmt: skip
    allocator = Allocator(scores, {}, job.problem)
    plans = [allocator.plan()]
    for size in hidden_sizes(job.problem, frozenset(scores)) if Axis.HIDDEN in scores else ():
        with suppress(UserError):  # no number of heads may fit this size
            plans.append(allocator.plan(fixed={Axis.HIDDEN: size}))
    used = [job.problem.used(plan.shape) for plan in plans]
    full = [plan for plan, share in zip(plans, used, strict=True) if share >= max(used) - TOLERANCE]
    job.plan = replace(min(full, key=job.chooser().loss), basis=job.head_basis)
    job.masked.set_gates(None)
    job.export()


def claim(folder: Path, options: list[str]) -> None:
    """Makes the folder one of these options' results, if it is not yet.

    Raises:
        UserError: the results that are there are of other options.
    """
    path = folder / "options.json"
    if path.is_file() and json.loads(path.read_text()) != options:
        raise UserError(f"{folder}: holds results of other options; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(options) + "\n")


def results(args: argparse.Namespace, common: list[str]) -> Iterator[Result]:
    """Runs what is missing, method by method."""
    for sparsity in args.sparsity:
        for method in args.methods:
            folder = args.output / f"{method}-{sparsity:g}"
            given = [*common, "--sparsity", str(sparsity), "--output", str(folder), "--quiet"]
            if not (folder / MANIFEST_FILE).is_file():
                print(f"{method} {sparsity:g}", file=sys.stderr, flush=True)
                if method in SELECTIONS:
                    select([*given, "--overwrite"], SELECTIONS[method])
                else:
                    share = ["--data-fraction", args.data_fraction] if method == "fast" else []
                    prune([*given, *share, "--variant", method, "--resume"])
            manifest = json.loads((folder / MANIFEST_FILE).read_text())
            yield Result(method, sparsity, folder, manifest)


def milliseconds(source: Source, task: Task, folder: Path) -> dict[int, float]:
    """A forward pass on the first validation examples, in float32 and eager, by batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = source.auto_class.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found = {}
    for size in BATCH_SIZES:
        batch = next(
            task.heldout.take(torch.arange(size) % len(task.heldout)).batches(size, device)
        )
        found[size] = forward_ms(model, inputs_of(batch))
    return found


def dense_model(args: argparse.Namespace, common: list[str]) -> tuple[PruneArguments, list[str]]:
    """The model that all runs start from, finetuned once where that is asked for."""
    # Options of variants that train weights are for those methods alone.
    first = parse([*common, "--variant", "vtrans", "--output", str(args.output / "model")])
    if first.finetune_first:
        first = finetune_first(first) or first
    return first, [*common, "--model", first.model, "--finetune-first", "false"]


def report(found: list[Result], source: Source, task: Task) -> list[dict[str, Any]]:
    """One record per row, speed measured now."""
    dense = Result("dense", 0.0, source.checkpoint.folder, found[0].manifest)
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for result in (dense, *found):
        times = milliseconds(source, task, result.folder)
        base = base or times
        rows.append(
            {
                "method": result.method,
                "removed": result.sparsity,
                "parameters": result.count("params"),
                "MACs": result.count("macs"),
                task.headline: result.score,
                "seconds": result.seconds,
                "steps": result.manifest["settings"]["steps"] if result.method in VARIANTS else 0,
                **{f"speedup, batch {n}": base[n] / times[n] for n in BATCH_SIZES},
            }
        )
    return rows


def run(arguments: list[str]) -> None:
    """Runs, measures, writes `table.json`, prints the table."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --data is not --data-fraction
    )
    methods = (*VARIANTS[::-1], *SELECTIONS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods), help="rows")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.6, 0.9], help="removed")
    parser.add_argument("--data-fraction", default="0.03", help="of --variant fast")
    parser.add_argument("--output", type=Path, required=True, help="folder; a rerun continues it")
    args, common = parser.parse_known_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    claim(args.output, [*common, f"--data-fraction={args.data_fraction}"])
    first, common = dense_model(args, common)
    source = open_source(first.model)
    found = list(results(args, common))
    seq_len = window_length(first, source)
    first = replace(first, samples=found[0].manifest["settings"]["samples"])
    task = task_data(first, source, seq_len)
    rows = report(found, source, task)
    atomic_write_text(args.output / "table.json", json.dumps(rows, indent=2) + "\n")
    print(table([tuple(rows[0]), *(tuple(map(_shown, row.values())) for row in rows)]))
    print(
        f"\n{task.protocol}. MACs: of {seq_len} tokens. Seconds: of "
        "training and choosing, loading and scoring left out. Speedup: of a forward pass over "
        f"validation examples of the dense model in float32, {torch.get_num_threads()} thread(s)."
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
