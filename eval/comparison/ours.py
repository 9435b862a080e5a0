"""The product as one method of the comparison: its own job, in full, on the comparison's samples.

All options but those that every method shares are at their defaults. One training for each seed
and layout, at `TRAINED_AT`; every other budget is allocated and exported from those masks
(`--masks`), but for the ablation that has a training for each. The training's seconds and memory
count in every cell that rests on it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from eval.baselines.interface import Case, Pruned, load_pruned
from eval.comparison.ablations import ABLATIONS, Ablation
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
        folder: of the trainings; they outlive a cell.
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
        """Trains the masks unless an earlier cell did, exports this budget, loads the result."""
        layout = "stock" if case.is_uniform else "per-layer"
        ablation = ABLATIONS[self.lever] if self.lever else Ablation()
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
        if not (trained / MANIFEST_FILE).is_file():
            start = ["--sparsity", str(trained_at), "--output", str(trained), "--resume"]
            prune([*common, *start], ablation.kind)
        result = trained
        if case.sparsity != trained_at:
            result = case.folder / "result"
            reuse = ["--masks", str(trained), "--sparsity", str(case.sparsity)]
            prune([*common, *reuse, "--output", str(result)], ablation.kind)
        manifest = json.loads((result / MANIFEST_FILE).read_text())
        training = json.loads((trained / MANIFEST_FILE).read_text())["phases"]
        seconds = sum(p["seconds"] for name, p in training.items() if name != MEASURING)
        peak = max(phase["peak_rss"] for phase in training.values())
        return Pruned(
            load_pruned(result, case.device),
            manifest["params"]["after"],
            read_pruning(case, result),
            earlier={"earlier_seconds": seconds, "earlier_peak_rss": peak},
        )


def read_pruning(case: Case, result: Path) -> Pruning:
    """What a run exported."""
    found = read_found(result, case.source)
    basis, factors = found.tuning.basis(found.rotation), found.tuning.factors()
    source = case.source
    return Pruning(source.checkpoint, source.architecture, found.plan, basis, scales=factors)
