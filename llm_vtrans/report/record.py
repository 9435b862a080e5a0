"""What a report shows of a run, read from its folder: manifest, metrics, masks, probing, scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_vtrans.errors import UserError, blame
from llm_vtrans.record.masks_file import MASKS_FILE
from llm_vtrans.record.output_folder import MANIFEST_FILE, what_to_name
from llm_vtrans.record.reporting import METRICS_FILE

REPORT_FILE = "report/index.html"
UNCHANGED = "name a folder that prune wrote, with the files as they were written"
PROBE_FOLDER = "probe"
SCORES_FILE = "scores.json"
COMPARISON_FILE = "compare/table.json"
PERPLEXITY = "ppl "  # and a text: a metric of a comparison
USUAL = ("stock", "-", "both", "none", "None")  # layouts and recoveries that go without saying


@dataclass(frozen=True)
class ComparisonRow:
    """One model of a comparison: a method at a size, with its perplexity per text."""

    method: str
    num_params: int
    perplexity: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A run as its report shows it.

    Attributes:
        folder: the result.
        manifest: `vtrans.json`.
        metrics: records of `metrics.jsonl`, empty where `--masks` took the place of training.
        hidden: flags of the kept hidden dimensions, empty if unknown.
        scores: `results` of a scorer's JSON file, empty if there is none.
        comparison: rows of a comparison, empty if there is none.
        probe: JSON of `llm-vtrans probe`, empty if it did not run.
        probe_folder: where its pictures lie.
    """

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, float]] = field(default_factory=list)
    hidden: tuple[bool, ...] = ()
    scores: dict[str, Any] = field(default_factory=dict)
    comparison: tuple[ComparisonRow, ...] = ()
    probe: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the folder; a run that is still being written has none of its own yet."""
        return self.folder.resolve().name

    @classmethod
    def read(
        cls,
        folder: Path,
        scores: Path | None = None,
        comparison: Path | None = None,
        probe: Path | None = None,
    ) -> RunRecord:
        """Reads a run; what lies beside the manifest is taken where it is found.

        Args:
            folder: a result of `prune`.
            scores: JSON of `llm-vtrans score`; by default `scores.json` in the folder.
            comparison: `table.json` of eval/compare.py; by default in the folder's `compare`.
            probe: folder of `llm-vtrans probe`; by default `probe` in the folder.

        Raises:
            UserError: no run, or a file that was named cannot be read.
        """
        with blame(folder, UNCHANGED):
            return cls._read(folder, scores, comparison, probe)

    @classmethod
    def _read(
        cls, folder: Path, scores: Path | None, comparison: Path | None, probe: Path | None
    ) -> RunRecord:
        manifest = _read_json(folder / MANIFEST_FILE, what_to_name(folder))
        if not isinstance(manifest, dict) or "params" not in manifest:
            raise UserError(f"{folder / MANIFEST_FILE}: not the manifest of a run")
        results = _optional(scores, folder / SCORES_FILE)
        rows = _optional(comparison, folder / COMPARISON_FILE)
        probed = _optional(probe and probe / "probe.json", folder / PROBE_FOLDER / "probe.json")
        return cls(
            folder,
            manifest,
            list(_read_metrics(folder / METRICS_FILE)),
            _hidden_flags(folder / MASKS_FILE),
            results.get("results", {}) if isinstance(results, dict) else {},
            tuple(comparison_rows(rows)),
            probed if isinstance(probed, dict) else {},
        )


def comparison_rows(content: Any) -> Iterator[ComparisonRow]:
    """Rows of the `table.json` of eval/compare.py; those without figures are left out."""
    rows = content.get("rows") if isinstance(content, dict) else None
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(figures := row.get("figures"), dict):
            continue
        means = {str(n): f["mean"] for n, f in figures.items() if isinstance(f, dict)}
        values = {
            n.removeprefix(PERPLEXITY): float(v)
            for n, v in means.items()
            if n.startswith(PERPLEXITY)
        }
        parts = [str(row.get("method")), str(row.get("layout")), str(row.get("recovery"))]
        name = ", ".join(part for part in parts if part not in USUAL)
        if values and "num_params" in means:
            yield ComparisonRow(name, int(means["num_params"]), values)


def _optional(named: Path | None, default: Path) -> Any:
    """A file that was named, or the default one if it is there, or an empty object."""
    if named is not None:
        return _read_json(named, "name a file that exists")
    return _read_json(default, "remove it") if default.is_file() else {}


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Records with a step; a line that a kill cut short is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield {k: float(v) for k, v in record.items() if isinstance(v, int | float)}


def _hidden_flags(path: Path) -> tuple[bool, ...]:
    """Which hidden dimensions stayed; empty where hidden dimensions were not recorded."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(bool(flag) for flag in file.get_tensor("keep.hidden").tolist())
    except (OSError, SafetensorError):
        return ()
