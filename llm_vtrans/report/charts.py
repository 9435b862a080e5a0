"""Small SVG charts: lines, bars, points and heat maps, without any library.

Every chart reads in black and white (dashes, markers and hatching tell series apart,
labels stand at the marks' own values) and by keyboard: it takes the focus once, arrow
keys walk its marks and the page's script reads each one's label out. The numbers stand
in a table below it as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from llm_vtrans.report.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NUM_STYLES,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    axis,
    bar_legend,
    dash_of,
    data_table,
    figure,
    frame,
    legend,
    marker,
    number,
    svg,
)

MAX_POINTS = 150  # marks of one line: more cannot be told apart at this width
MIN_BAR = 9.0  # SVG units of one bar with its gap; wider charts scroll


def xy_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    note: str = "",
    is_log: bool = False,
) -> str:
    """Lines or points over a numeric axis.

    Args:
        title: of the figure.
        x_label: with the unit.
        y_label: with the unit.
        series: at least one; those without finite points are left out.
        note: below the chart.
        is_log: logarithmic y axis; all y must then be positive.

    Returns:
        A figure, or an empty string where there is nothing to draw.
    """
    series = [_finite(s, i) for i, s in enumerate(series)]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    scale_x, ticks_x = axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False, is_tight=True)
    scale_y, ticks_y = axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, is_log)
    parts = [frame(x_label, y_label, scale_x, ticks_x, scale_y, ticks_y)]
    for s in series:
        shown = _thin(s)
        style = s.style or 0
        if s.is_line:
            path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in s.points)
            dash = dash_of(style)
            parts.append(f'<polyline class="line s{style % NUM_STYLES}" points="{path}"{dash}/>')
        every = max(1, len(shown.points) // 8) if s.is_line else 1
        for index, (x, y) in enumerate(shown.points):
            name = shown.labels[index] if shown.labels else s.name
            label = f"{name}: {x_label} {number(x)}, {y_label} {number(y)}"
            is_drawn = index % every == every // 2
            parts.append(marker(scale_x(x), scale_y(y), style, label, is_drawn))
    rows = [
        (s.labels[i] if s.labels else s.name, number(x), number(y))
        for s in map(_thin, series)
        for i, (x, y) in enumerate(s.points)
    ]
    drawing = svg(title, WIDTH, HEIGHT, parts) + legend(series)
    return figure(title, drawing, data_table(("series", x_label, y_label), rows), note)


def bar_chart(
    title: str,
    x_label: str,
    y_label: str,
    categories: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    note: str = "",
    is_stacked: bool = False,
    top: float | None = None,
) -> str:
    """Bars side by side or stacked, one group per category; many categories scroll.

    Args:
        title: of the figure.
        x_label: what the categories are.
        y_label: with the unit.
        categories: names, in order.
        series: name and one value per category.
        note: below the chart.
        is_stacked: series on top of one another.
        top: end of the y axis; by default the largest value.
    """
    per_group = 1 if is_stacked else len(series)
    group = max((WIDTH - LEFT - RIGHT) / max(1, len(categories)), MIN_BAR * per_group + 4)
    width = round(LEFT + RIGHT + group * len(categories))
    totals = [sum(v) if is_stacked else max(v) for v in zip(*(v for _, v in series), strict=True)]
    scale_y, ticks_y = axis(0, top or max([*totals, 1e-12]), HEIGHT - BOTTOM, TOP, False)
    every = math.ceil(len(categories) / ((width - LEFT) / 34)) if len(categories) > 6 else 1
    names = [(n if i % every == 0 else "") for i, n in enumerate(categories)]
    parts = [frame(x_label, y_label, lambda i: LEFT + (i + 0.5) * group, [], scale_y, ticks_y,
                    width, names)]  # fmt: skip
    bar = (group - min(12, group * 0.25)) / per_group
    base = [0.0] * len(categories)
    for style, (name, values) in enumerate(series):
        for i, value in enumerate(values):
            start = LEFT + i * group + (group - bar * per_group) / 2
            x = start if is_stacked else start + style * bar
            y, bottom = scale_y(base[i] + value), scale_y(base[i])
            label = f"{categories[i]}, {name}: {number(value)}"
            parts.append(
                f'<rect class="mark bar b{style % NUM_STYLES}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{bar:.1f}" height="{max(bottom - y, 0.4):.1f}" '
                f'data-label="{escape(label)}"><title>{escape(label)}</title></rect>'
            )
            if is_stacked:
                base[i] += value
    rows = [
        (category, *(number(values[i]) for _, values in series))
        for i, category in enumerate(categories)
    ]
    names_below = bar_legend([name for name, _ in series]) if len(series) > 1 else ""
    drawing = svg(title, width, HEIGHT, parts) + names_below
    return figure(title, drawing, data_table((x_label, *(n for n, _ in series)), rows), note)


def heat_map(
    title: str,
    row_label: str,
    column_label: str,
    values: Sequence[Sequence[float]],
    marked: Sequence[Sequence[bool]],
    note: str = "",
    marked_name: str = "pruned",
    top: float | None = None,
) -> str:
    """Cells shaded from white (0) to dark, a cross over the marked ones.

    Args:
        title: of the figure.
        row_label: what a row is, such as `layer`.
        column_label: what a column is, such as `head`.
        values: `rows x columns`, from 0 up.
        marked: cells that are crossed out, same shape.
        note: below the chart.
        marked_name: what a crossed cell is.
        top: value of the darkest shade; by default the largest.
    """
    num_rows, num_columns = len(values), max(len(row) for row in values)
    cell = min(34.0, max(11.0, (WIDTH - LEFT - RIGHT) / num_columns))
    width = round(LEFT + RIGHT + cell * num_columns)
    height = round(TOP + BOTTOM + cell * num_rows)
    largest = top or max((v for row in values for v in row if math.isfinite(v)), default=1) or 1.0
    every = math.ceil(20 / cell)
    parts = [
        f'<text class=axis x="{(LEFT + width) / 2:.0f}" y="{height - 6}" '
        f'text-anchor=middle>{escape(column_label)}</text>',
        f'<text class=axis transform="translate(14 {height / 2:.0f}) rotate(-90)" '
        f'text-anchor=middle>{escape(row_label)}</text>',
    ]  # fmt: skip
    for j in range(0, num_columns, every):
        x = LEFT + (j + 0.5) * cell
        y = TOP + num_rows * cell + 14
        parts.append(f'<text class=tick x="{x:.1f}" y="{y:.1f}" text-anchor=middle>{j}</text>')
    for i, row in enumerate(values):
        y = TOP + i * cell
        if i % every == 0:
            parts.append(
                f'<text class=tick x="{LEFT - 6}" y="{y + cell / 2 + 4:.1f}" '
                f"text-anchor=end>{i}</text>"
            )
        for j, value in enumerate(row):
            x = LEFT + j * cell
            shade = min(1.0, value / largest) if math.isfinite(value) else 0.0
            state = f", {marked_name}" if marked[i][j] else ""
            label = f"{row_label} {i}, {column_label} {j}: {number(value)}{state}"
            grey = round(255 - 205 * shade)
            parts.append(
                f'<rect class="mark cell" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}" fill="rgb({grey},{grey},{min(255, grey + 25)})" '
                f'data-label="{escape(label)}"><title>{escape(label)}</title></rect>'
            )
            if marked[i][j]:
                a, b, c, d = x + 2, y + 2, x + cell - 3, y + cell - 3
                path = f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}M{c:.1f} {b:.1f}L{a:.1f} {d:.1f}"
                # A light rim below the dark cross: one of the two shows on every shade.
                parts.append(f'<path class=rim d="{path}"/><path class=cross d="{path}"/>')
    rows = [
        (str(i), *(number(v) + (f" ({marked_name})" if m else "") for v, m in
                   zip(row, marked[i], strict=True)))
        for i, row in enumerate(values)
    ]  # fmt: skip
    scale = f"White is 0, the darkest shade {number(largest)}."
    note = f"{note} {scale}" if note else scale
    header = (f"{row_label} \\ {column_label}", *(str(j) for j in range(num_columns)))
    return figure(title, svg(title, width, height, parts), data_table(header, rows), note)


def _finite(series: Series, position: int) -> Series:
    """The series with a style of its own and without points that cannot be drawn."""
    kept = [i for i, p in enumerate(series.points) if all(map(math.isfinite, p))]
    labels = [series.labels[i] for i in kept] if series.labels else ()
    style = position if series.style is None else series.style
    points = [series.points[i] for i in kept]
    return Series(series.name, points, style, labels, series.is_line)


def _thin(series: Series) -> Series:
    """Every k-th point and the last, so that at most about `MAX_POINTS` marks stay."""
    step = math.ceil(len(series.points) / MAX_POINTS)
    if step == 1:
        return series
    kept = [*range(0, len(series.points) - 1, step), len(series.points) - 1]
    labels = [series.labels[i] for i in kept] if series.labels else ()
    points = [series.points[i] for i in kept]
    return Series(series.name, points, series.style, labels, series.is_line)
