"""The product as one method of the comparison: its own job, in full, on the comparison's samples.

All options but those that every method shares are at their defaults. One training for each seed
and layout, at `TRAINED_AT`; every other budget is allocated, tuned and exported from those masks
(`--masks`), but for the ablation that has a training for each. What comes out stays, so that
every recovery starts from the same. What a result took counts in every cell that rests on it, the
training too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from eval.baselines.interface import Case, Cost, Pruned, load_pruned
from eval.comparison.ablations import ablation_of
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.prune import prune
from llm_vtrans.record.masks_file import read_found
from llm_vtrans.record.output_folder import MANIFEST_FILE
from llm_vtrans.record.reporting import versions

TRAINED_AT = 0.5
MEASURING = "score"  # the phase of a run that belongs to no method


@dataclass(frozen=True)
class Ours:
    """VIB masks by `llm_vtrans prune`.

    Attributes:
        model: dense checkpoint as the user named it.
        data: calibration text.
        samples: calibration windows.
        seq_len: tokens in one.
        folder: of trainings and results; they outlive a cell.
        lever: what is taken away from it, a name of `ABLATIONS`; None for all as it is.
    """

    model: str
    data: str
    samples: int
    seq_len: int
    folder: Path
    lever: str | None = None
    is_uniform: bool = False
    is_plain: bool = True

    def prune(self, case: Case) -> Pruned:
        """Trains and exports what no earlier cell did, and loads the result."""
        layout = "stock" if case.is_uniform else "per-layer"
        ablation = ablation_of(self.lever)
        common = [
            *("--model", self.model, "--data", self.data, "--samples", str(self.samples)),
            *("--seq-len", str(self.seq_len), "--seed", str(case.seed), "--layout", layout),
            *("--round-to", "1"),  # as all methods do, whatever a device prefers
            *ablation.options,
        ]
        trained_at = TRAINED_AT if ablation.reuses_masks else case.sparsity
        deciding = [case.source.checkpoint.sha256, versions(), *common[2:], self.lever, trained_at]
        digest = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:12]
        trained = self.folder / f"seed{case.seed}-{layout}-{digest}"
        runs = {trained: ["--sparsity", str(trained_at)]}
        if case.sparsity != trained_at:
            reuse = ["--masks", str(trained), "--sparsity", str(case.sparsity)]
            runs[self.folder / f"{trained.name}-{case.sparsity:g}"] = reuse
        phases = []
        for result, options in runs.items():
            if not (result / MANIFEST_FILE).is_file():
                prune([*common, *options, "--output", str(result), "--resume"], ablation.kind)
            manifest = json.loads((result / MANIFEST_FILE).read_text())
            phases += [took for name, took in manifest["phases"].items() if name != MEASURING]
        return Pruned(
            load_pruned(result, case.device),
            manifest["params"]["after"],
            read_pruning(case, result),
            cost=Cost(sum(p["seconds"] for p in phases), max(p["peak_rss"] for p in phases)),
        )


def read_pruning(case: Case, result: Path) -> Pruning:
    """What a run exported."""
    found = read_found(result, case.source)
    basis, factors = found.tuning.basis(found.rotation), found.tuning.factors()
    source = case.source
    return Pruning(source.checkpoint, source.architecture, found.plan, basis, scales=factors)
