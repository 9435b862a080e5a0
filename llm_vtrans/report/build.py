"""Puts a report together and writes it."""

from __future__ import annotations

from pathlib import Path

from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.report import sections
from llm_vtrans.report.page import page
from llm_vtrans.report.record import REPORT_FILE, RunRecord


def run_page(record: RunRecord, name: str) -> str:
    """The report of one run as HTML."""
    return page(
        f"{name}: pruning report",
        sections.lead(record),
        [
            ("Dense against pruned", sections.headline(record)),
            ("Training", sections.training(record)),
            ("What was kept", sections.kept(record)),
            ("Where the parameters went", sections.where(record)),
            ("Quality against size", sections.quality(record)),
            ("Score step by step", sections.layouts(record)),
            ("What the heads look at", sections.probing(record)),
            ("Reproduce", sections.reproduce(record)),
        ],
    )


def comparison_page(records: list[RunRecord]) -> str:
    """Several runs side by side as HTML."""
    return page(
        f"{len(records)} pruning runs",
        "",
        [
            ("Side by side", sections.side_by_side(records)),
            ("Charts", sections.overlays(records)),
            *((f"{record.name}: command", sections.reproduce(record)) for record in records),
        ],
    )


def write_run_report(folder: Path, name: str) -> None:
    """Writes `report/index.html` of a finished result.

    Args:
        folder: holds the manifest; it may still bear a temporary name.
        name: what the report calls the run.
    """
    path = folder / REPORT_FILE
    path.parent.mkdir(exist_ok=True)
    atomic_write_text(path, run_page(RunRecord.read(folder), name))
