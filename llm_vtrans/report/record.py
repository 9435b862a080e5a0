"""What a report shows of a run, read from its folder: manifest, metrics, masks, probing, scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_vtrans.errors import UserError, blame
from llm_vtrans.manifest import MASKS_FILE
from llm_vtrans.output_folder import MANIFEST_FILE
from llm_vtrans.reporting import METRICS_FILE

REPORT_FILE = "report/index.html"
UNCHANGED = "name a folder that prune wrote, with the files as they were written"
PROBE_FOLDER = "probe"
SCORES_FILE = "scores.json"
COMPARISON_FILE = "compare.json"


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
            comparison: JSON of `eval/compare.py`; by default `compare.json` in the folder.
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
        manifest = _read_json(folder / MANIFEST_FILE, "name a folder that prune wrote")
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
    """Rows of a comparison's JSON: a list, or an object that holds one under `rows`.

    A row names its `method`, its size (`num_params` or `parameters`) and perplexities: an
    object `perplexity` of texts, or a number per text beside the other fields. Rows without
    a size or a perplexity are left out.
    """
    if isinstance(content, dict):
        content = next((v for v in content.values() if isinstance(v, list)), [])
    for row in content if isinstance(content, list) else []:
        if not isinstance(row, dict):
            continue
        params = _number(row.get("num_params", row.get("parameters", row.get("params"))))
        known = {"method", "layout", "sparsity", "num_params", "parameters", "params", "seed",
                 "seconds", "bytes", "macs"}  # fmt: skip
        texts = row.get("perplexity")
        texts = (
            texts
            if isinstance(texts, dict)
            else (
                {"perplexity": texts}
                if texts is not None
                else {name: value for name, value in row.items() if name not in known}
            )
        )
        values = {
            str(name): value
            for name, raw in texts.items()
            if (value := _number(raw.get("value") if isinstance(raw, dict) else raw)) is not None
            and value > 0
        }
        if params and values:
            layout = f" ({row['layout']})" if row.get("layout") else ""
            yield ComparisonRow(f"{row.get('method', '?')}{layout}", int(params), values)


def _number(value: Any) -> float | None:
    """A JSON value as a number, or None."""
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return None


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
