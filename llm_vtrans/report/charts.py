"""Small SVG charts: lines, bars, points and heat maps, without any library.

Every chart reads in black and white (dashes, markers and hatching tell series apart,
labels stand at the marks' own values) and by keyboard: it takes the focus once, arrow
keys walk its marks and the page's script reads each one's label out. The numbers stand
in a table below it as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250  # of the drawing, in SVG units: about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5", "12 6")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
NUM_STYLES = len(DASHES)
MAX_POINTS = 150  # marks of one line: more cannot be told apart at this width
MIN_BAR = 9.0  # SVG units of one bar with its gap; wider charts scroll


@dataclass(frozen=True)
class Series:
    """A named sequence of points.

    Attributes:
        name: shown in the legend.
        points: `(x, y)` pairs; pairs that are not finite are left out.
        style: number of dash, marker and hatching; None takes the position in the chart.
        labels: what a point is called, one each, or none.
        is_line: whether the points are joined.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int | None = None
    labels: Sequence[str] = ()
    is_line: bool = True


def number(value: float) -> str:
    """A number for people: four significant digits, thousands apart."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return "—"
    return (
        f"{value:.4g}"
        if 1e-3 <= abs(value) < 1e4
        else f"{value:,.0f}"
        if abs(value) >= 1e4
        else f"{value:.2e}"
    )


def figure(title: str, drawing: str, table: str, note: str = "") -> str:
    """A chart with its heading, a line of explanation and its numbers.

    Args:
        title: plain text.
        drawing: SVG.
        table: HTML of the same numbers.
        note: plain text below the chart.
    """
    caption = f"<p class=note>{escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f"<div class=scroll>{drawing}</div><output aria-live=polite></output>{caption}"
        f"<details><summary>Numbers</summary><div class=scroll>{table}</div></details></figure>"
    )


def data_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells; the first column names the row."""
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
    scale_x, ticks_x = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
    scale_y, ticks_y = _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, is_log)
    parts = [_frame(x_label, y_label, scale_x, ticks_x, scale_y, ticks_y)]
    for s in series:
        shown = _thin(s)
        style = s.style or 0
        if s.is_line:
            path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in s.points)
            dash = f' stroke-dasharray="{DASHES[style % NUM_STYLES]}"' if style else ""
            parts.append(f'<polyline class="line s{style % NUM_STYLES}" points="{path}"{dash}/>')
        every = max(1, len(shown.points) // 8) if s.is_line else 1
        for index, (x, y) in enumerate(shown.points):
            name = shown.labels[index] if shown.labels else s.name
            label = f"{name}: {x_label} {number(x)}, {y_label} {number(y)}"
            is_drawn = index % every == every // 2
            parts.append(_marker(scale_x(x), scale_y(y), style, label, is_drawn))
    rows = [
        (s.labels[i] if s.labels else s.name, number(x), number(y))
        for s in map(_thin, series)
        for i, (x, y) in enumerate(s.points)
    ]
    drawing = _svg(title, WIDTH, HEIGHT, parts) + _legend(series)
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
    scale_y, ticks_y = _axis(0, top or max([*totals, 1e-12]), HEIGHT - BOTTOM, TOP, False)
    every = math.ceil(len(categories) / ((width - LEFT) / 34)) if len(categories) > 6 else 1
    names = [(n if i % every == 0 else "") for i, n in enumerate(categories)]
    parts = [_frame(x_label, y_label, lambda i: LEFT + (i + 0.5) * group, [], scale_y, ticks_y,
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
    legend = _bar_legend([name for name, _ in series]) if len(series) > 1 else ""
    drawing = _svg(title, width, HEIGHT, parts) + legend
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
                parts.append(
                    f'<path class=cross d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}'
                    f'M{c:.1f} {b:.1f}L{a:.1f} {d:.1f}"/>'
                )
    rows = [
        (str(i), *(number(v) + (f" ({marked_name})" if m else "") for v, m in
                   zip(row, marked[i], strict=True)))
        for i, row in enumerate(values)
    ]  # fmt: skip
    header = (f"{row_label} \\ {column_label}", *(str(j) for j in range(num_columns)))
    return figure(title, _svg(title, width, height, parts), data_table(header, rows), note)


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


def _axis(
    low: float, high: float, start: float, end: float, is_log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Scale of an axis and its ticks, round numbers."""
    if is_log:
        low, high = math.log10(low), math.log10(high)
        span = max(high - low, 0.1)
        low, high = low - 0.06 * span, high + 0.06 * span
        ticks = _log_ticks(low, high)
        return lambda v: start + (math.log10(v) - low) / (high - low) * (end - start), ticks
    if high == low:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    step = _round_step((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def _round_step(raw: float) -> float:
    power = 10 ** math.floor(math.log10(raw))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if raw <= m * power * (1 + 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [m * 10.0**d for d in decades for m in multiples]
        ticks = [t for t in ticks if low <= math.log10(t) <= high]
        if len(ticks) >= 3:
            return ticks
    return [10**low, 10**high]


def _frame(
    x_label: str,
    y_label: str,
    scale_x: Callable[[float], float],
    ticks_x: Sequence[float],
    scale_y: Callable[[float], float],
    ticks_y: Sequence[float],
    width: int = WIDTH,
    names: Sequence[str] = (),
) -> str:
    """Grid, ticks and axis labels."""
    parts = []
    for value in ticks_y:
        y = scale_y(value)
        parts.append(f'<path class=grid d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        parts.append(
            f'<text class=tick x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor=end>'
            f"{_short(value)}</text>"
        )
    texts = [(scale_x(v), _short(v)) for v in ticks_x]
    texts += [(scale_x(i), name) for i, name in enumerate(names) if name]
    for x, text in texts:
        parts.append(
            f'<text class=tick x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor=middle>'
            f"{escape(text)}</text>"
        )
    parts.append(f'<path class=axisline d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{width - RIGHT}"/>')
    parts.append(
        f'<text class=axis x="{(LEFT + min(width, WIDTH)) / 2:.0f}" y="{HEIGHT - 6}" '
        f"text-anchor=middle>{escape(x_label)}</text>"
    )
    parts.append(
        f'<text class=axis transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) '
        f'rotate(-90)" text-anchor=middle>{escape(y_label)}</text>'
    )
    return "".join(parts)


def _short(value: float) -> str:
    """A tick's number with a suffix in place of zeros."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{round(value, 10):.4g}"


def _marker(x: float, y: float, style: int, label: str, is_drawn: bool) -> str:
    """A point's symbol; points that would clutter a line show only when they are reached."""
    kind = MARKERS[style % NUM_STYLES]
    shape = _symbol(kind, x, y, 4)
    hidden = "" if is_drawn else " quiet"
    return (
        f'<path class="mark point s{style % NUM_STYLES}{hidden}" d="{shape}" '
        f'data-label="{escape(label)}"><title>{escape(label)}</title></path>'
    )


def _symbol(kind: str, x: float, y: float, r: float) -> str:
    """Path of a marker around a point."""
    if kind == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r), (r, r), (-r, r)],
        "diamond": [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)],
        "cross": [(-r, -1), (-1, -1), (-1, -r), (1, -r), (1, -1), (r, -1), (r, 1), (1, 1),
                  (1, r), (-1, r), (-1, 1), (-r, 1)],
        "bar": [(-1.5, -r - 1), (1.5, -r - 1), (1.5, r + 1), (-1.5, r + 1)],
    }[kind]  # fmt: skip
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "z"


def _legend(series: Sequence[Series]) -> str:
    """Names beside their line and marker."""
    if len(series) == 1 and not series[0].labels:
        return ""
    seen = {s.name: s for s in series}
    items = []
    for name, s in seen.items():
        style = (s.style or 0) % NUM_STYLES
        dash = f' stroke-dasharray="{DASHES[style]}"' if style else ""
        line = f'<path class="line s{style}" d="M1 7H29"{dash}/>' if s.is_line else ""
        symbol = f'<path class="point s{style}" d="{_symbol(MARKERS[style], 15, 7, 4)}"/>'
        items.append(
            f"<li><svg width=30 height=14 aria-hidden=true>{line}{symbol}</svg>{escape(name)}</li>"
        )
    return f"<ul class=legend>{''.join(items)}</ul>"


def _bar_legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg width=18 height=14 aria-hidden=true><rect class="bar b{i % NUM_STYLES}" '
        f"x=1 y=1 width=16 height=12 /></svg>{escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f"<ul class=legend>{items}</ul>"


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """A drawing that takes the keyboard's focus; arrow keys walk its marks."""
    style = f' style="min-width:{width}px"' if width > WIDTH else ""
    hint = f"{title}. Arrow keys read the values."
    return (
        f'<svg class=chart tabindex=0 role=img aria-label="{escape(hint)}" '
        f'viewBox="0 0 {width} {height}"{style}>{"".join(parts)}</svg>'
    )
