"""One plot per metric: quality against size, a panel for each layout and recovery.

Methods differ by marker, their variants by line, so that a black and white print can be read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.comparison.cell import DENSE
from eval.comparison.report import EXCESS, Row, metric_names
from llm_vtrans.report.record import PERPLEXITY

MARKERS = "os^vD*PX<>ph"
LINES = {"": "-", "hidden": ":", "rotation": "--"}


def is_available() -> bool:
    """Whether matplotlib is installed (the extra `eval`)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes one PNG per metric.

    Args:
        rows: of the table, dense ones among them.
        folder: to write into.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("agg")  # no display is needed

    pruned = [row for row in rows if row.method != DENSE and row.figures]
    bases = list(dict.fromkeys(row.method.partition("+")[0] for row in pruned))
    panels = list(dict.fromkeys((row.layout, row.recovery) for row in pruned))
    files = []
    for metric in metric_names(pruned):
        file = folder / f"{re.sub('[^a-z0-9]+', '-', metric.lower()).strip('-')}.png"
        _plot_metric(metric, pruned, [r for r in rows if r.method == DENSE], bases, panels, file)
        files.append(file)
    return files


def _plot_metric(
    metric: str,
    pruned: Sequence[Row],
    dense: Sequence[Row],
    bases: Sequence[str],
    panels: Sequence[tuple[str, str]],
    file: Path,
) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels) + 2.5, 6), sharey=True, squeeze=False
    )
    for axis, (layout, recovery) in zip(axes[0], panels, strict=True):
        shown = [r for r in pruned if (r.layout, r.recovery) == (layout, recovery)]
        for method in dict.fromkeys(row.method for row in shown):
            base, _, variant = method.partition("+")
            points = sorted(
                (row.figures["num_params"].value / 1e6, row.figures[metric])
                for row in shown
                if row.method == method and metric in row.figures
            )
            axis.errorbar(
                [size for size, _ in points],
                [value.value for _, value in points],
                yerr=[value.spread or 0.0 for _, value in points],
                label=method,
                marker=MARKERS[bases.index(base) % len(MARKERS)],
                linestyle=LINES[variant],
                color="black" if base == "ours" else f"C{bases.index(base) % 10}",
                linewidth=2.5 if base == "ours" else 1,
                capsize=3,
            )
        for row in dense[:1]:
            axis.axhline(row.figures[metric].value, color="grey", linewidth=0.8, label="dense")
        if metric.startswith(PERPLEXITY):
            axis.set_yscale("log")
        elif metric.startswith(EXCESS):
            axis.set_yscale("symlog", linthresh=0.1)
        axis.set_title(f"layout {layout}, recovery {recovery}")
        axis.set_xlabel("parameters, millions")
    axes[0][0].set_ylabel(f"{metric}, nats per token" if metric.startswith(EXCESS) else metric)
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize="small")
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / (6 * len(panels) + 2.5), 1))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
