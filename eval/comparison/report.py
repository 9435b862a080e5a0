"""Cells -> rows with mean and spread over seeds, and tables of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from eval.baselines import BASELINES
from eval.comparison.cell import DENSE, NO_RECOVERY, OURS
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.report.record import PERPLEXITY

Record = Mapping[str, Any]

EXCESS = "excess "  # and a text: nats per token over the dense model
EXCESS_DECIMALS = 4  # a fifth of a redundant model costs thousandths
CLOSED_FORM = "least-squares"  # the recovery that takes no training


@dataclass(frozen=True)
class Figure:
    """Mean over seeds and the sample standard deviation, which one seed does not have."""

    value: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of one value per seed."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def show(self, decimals: int) -> str:
        """`12.34 ± 0.05`."""
        spread = "" if self.spread is None else f" ± {self.spread:.{decimals}f}"
        return f"{self.value:,.{decimals}f}{spread}"


@dataclass(frozen=True)
class Row:
    """One method at one budget, layout and recovery, over all seeds.

    Attributes:
        method: its name.
        layout: `stock`, `per-layer`, or `both` where they are the same.
        recovery: its name.
        sparsity: share removed that was asked for.
        num_seeds: cells that were computed.
        figures: metric -> mean and spread; empty if the budget is out of reach.
        note: what to know, or why there are no figures.
    """

    method: str
    layout: str
    recovery: str
    sparsity: float
    num_seeds: int
    figures: Mapping[str, Figure] = field(default_factory=dict)
    note: str = ""


def quality(record: Record, dense: Record) -> dict[str, float]:
    """Metrics of one cell; excess loss is over the dense cell, in nats per token."""
    metrics: dict[str, float] = {}
    for text, perplexity in record["perplexity"].items():
        metrics[f"{PERPLEXITY}{text}"] = perplexity["value"]
        metrics[f"{EXCESS}{text}"] = perplexity["nll"] - dense["perplexity"][text]["nll"]
    return {**metrics, **record["tasks"]}


def make_rows(records: Iterable[Record], failures: Mapping[tuple[Any, ...], str]) -> list[Row]:
    """One row for each method, budget, layout and recovery, in the order of the records.

    Args:
        records: contents of the cells' files; dense ones, one per seed, among them.
        failures: group (method, sparsity, layout, recovery) -> what went wrong in its process.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {key: [] for key in failures}
    dense: dict[int, Record] = {}
    for record in records:
        cell = record["cell"]
        group = cell["method"], cell["sparsity"], cell["layout"], cell["recovery"]
        groups.setdefault(group, []).append(record)
        if cell["method"] == DENSE:
            dense[cell["seed"]] = record
    rows = []
    for group, found in groups.items():
        done = [r for r in found if r["status"] == "done"]
        notes = [*dict.fromkeys(r["note"] for r in found if r.get("note"))]
        notes += [failures[group]] if group in failures else []
        method, sparsity, layout, recovery = group
        figures: dict[str, Figure] = {}
        if done and dense:
            reference = next(iter(dense.values()))
            metrics = [quality(r, dense.get(r["cell"]["seed"], reference)) for r in done]
            costs = ("num_params", "macs", "seconds", "peak_rss")
            cells = [m | {n: r[n] for n in costs} for m, r in zip(metrics, done, strict=True)]
            figures = {name: Figure.of([cell[name] for cell in cells]) for name in cells[0]}
        rows.append(Row(method, layout, recovery, sparsity, len(done), figures, "; ".join(notes)))
    return sorted(rows, key=lambda r: (r.method != DENSE, r.recovery != NO_RECOVERY, r.recovery,
                                       r.sparsity, r.layout))  # fmt: skip


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Quality metrics of the table, costs left out."""
    costs = {"num_params", "macs", "seconds", "peak_rss"}
    return [n for n in dict.fromkeys(n for r in rows for n in r.figures) if n not in costs]


@dataclass(frozen=True)
class Beside:
    """Ours and the selection of least excess, on one text.

    Attributes:
        row: ours.
        text: name.
        ours: excess.
        other: the least of the others.
        which: method and recovery of that.
    """

    row: Row
    text: str
    ours: Figure
    other: Figure
    which: str

    @property
    def ratio(self) -> str:
        """Ours as a share of the other, which tells something as long as that costs anything."""
        return f"{self.ours.value / self.other.value:.2f}" if self.other.value > 0 else "-"


def beside(rows: Sequence[Row]) -> list[Beside]:
    """Ours beside the best other selection of the same size, on every text.

    Others come as they are, with closed-form recovery, and with the one that ours has.
    """
    found = []
    for row in rows:
        if row.method != OURS:
            continue
        others = [
            other
            for other in rows
            if other.method in BASELINES
            and other.sparsity == row.sparsity
            and other.layout in ("stock", row.layout)
            and other.recovery in (NO_RECOVERY, CLOSED_FORM, row.recovery)
        ]
        for name, ours in row.figures.items():
            known = [(other.figures[name], other) for other in others if name in other.figures]
            if name.startswith(EXCESS) and known:
                best, other = min(known, key=lambda pair: pair[0].value)
                with_recovery = "" if other.recovery == NO_RECOVERY else f", {other.recovery}"
                which = f"{other.method}{with_recovery}"
                found.append(Beside(row, name.removeprefix(EXCESS), ours, best, which))
    return found


def markdown(rows: Sequence[Row], protocol: str) -> str:
    """The whole table, and a short one of ours beside the best others."""
    metrics = metric_names(rows)
    header = ["removed", "method", "layout", "recovery", *metrics, "parameters", "MACs (M)",
              "seconds", "peak MB", "seeds", "note"]  # fmt: skip
    lines = []
    for row in rows:
        figures = row.figures
        values = [_show(figures.get(name), _decimals(name)) for name in metrics]
        costs = [
            _show(figures.get("num_params"), 0),
            _show(figures.get("macs"), 1, 1e6),
            _show(figures.get("seconds"), 1),
            _show(figures.get("peak_rss"), 0, 1e6),
        ]
        removed = "" if row.method == DENSE else f"{row.sparsity:.0%}"
        start = [removed, row.method, row.layout, row.recovery]
        lines.append([*start, *values, *costs, str(row.num_seeds), row.note])
    parts = [_table(header, lines), protocol]
    if pairs := beside(rows):
        header = ["removed", "layout", "recovery", "text", "ours", "best other", "which",
                  "ours / best other"]  # fmt: skip
        short = []
        for pair in pairs:
            row = pair.row
            start = [f"{row.sparsity:.0%}", row.layout, row.recovery, pair.text]
            excess = [figure.show(EXCESS_DECIMALS) for figure in (pair.ours, pair.other)]
            short.append([*start, *excess, pair.which, pair.ratio])
        parts.append(_table(header, short))
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def _decimals(metric: str) -> int:
    if metric.startswith(EXCESS):
        return EXCESS_DECIMALS
    return 2 if metric.startswith(PERPLEXITY) else 3


def _show(figure: Figure | None, decimals: int, unit: float = 1.0) -> str:
    if figure is None:
        return "-"
    spread = None if figure.spread is None else figure.spread / unit
    return Figure(figure.value / unit, spread).show(decimals)


def write(rows: Sequence[Row], protocol: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `table.md` and `table.json`."""
    atomic_write_text(folder / "table.md", markdown(rows, protocol))
    content = {
        "protocol": protocol,
        "settings": settings,
        "rows": [
            {
                "method": row.method, "layout": row.layout, "recovery": row.recovery,
                "sparsity": row.sparsity, "num_seeds": row.num_seeds, "note": row.note,
                "figures": {n: {"mean": f.value, "spread": f.spread}
                            for n, f in row.figures.items() if math.isfinite(f.value)},
            }
            for row in rows
        ],
        "beside": [
            {
                "sparsity": pair.row.sparsity, "layout": pair.row.layout,
                "recovery": pair.row.recovery, "text": pair.text, "ours": pair.ours.value,
                "best_other": pair.other.value, "which": pair.which,
            }
            for pair in beside(rows)
        ],
    }  # fmt: skip
    atomic_write_text(folder / "table.json", json.dumps(content, indent=2, default=list) + "\n")
