"""What charts are made of: axes, ticks, markers, legends, the frame around a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230  # of the drawing, in SVG units: about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5")  # one fewer than markers: 30 pairs
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
NUM_STYLES = len(MARKERS)


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


def axis(
    low: float, high: float, start: float, end: float, is_log: bool, is_tight: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Scale of an axis and its ticks, round numbers; a tight one ends with the values."""
    if is_log:
        low, high = math.log10(low), math.log10(high)
        span = max(high - low, 0.1)
        low, high = low - 0.06 * span, high + 0.06 * span
        ticks = _log_ticks(low, high)
        return lambda v: start + (math.log10(v) - low) / (high - low) * (end - start), ticks
    if high == low:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    step = _round_step((high - low) / 4)
    if is_tight:
        low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)  # room for markers
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = [i * step for i in range(first, last + 1)]
        return lambda v: start + (v - low) / (high - low) * (end - start), ticks
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


def frame(
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


def dash_of(style: int) -> str:
    """Attribute of a line's dashes."""
    dashes = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def marker(x: float, y: float, style: int, label: str, is_drawn: bool) -> str:
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


def legend(series: Sequence[Series]) -> str:
    """Names beside their line and marker."""
    if len(series) == 1 and not series[0].labels:
        return ""
    seen = {s.name: s for s in series}
    items = []
    for name, s in seen.items():
        style = (s.style or 0) % NUM_STYLES
        dash = dash_of(s.style or 0)
        line = f'<path class="line s{style}" d="M1 7H29"{dash}/>' if s.is_line else ""
        symbol = f'<path class="point s{style}" d="{_symbol(MARKERS[style], 15, 7, 4)}"/>'
        items.append(
            f"<li><svg width=30 height=14 aria-hidden=true>{line}{symbol}</svg>{escape(name)}</li>"
        )
    return f"<ul class=legend>{''.join(items)}</ul>"


def bar_legend(names: Sequence[str]) -> str:
    """Names beside their hatching."""
    items = "".join(
        f'<li><svg width=18 height=14 aria-hidden=true><rect class="bar b{i % NUM_STYLES}" '
        f"x=1 y=1 width=16 height=12 /></svg>{escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f"<ul class=legend>{items}</ul>"


def svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """A drawing that takes the keyboard's focus; arrow keys walk its marks."""
    bound = "min" if width > WIDTH else "max"  # a small drawing is not blown up, a wide one scrolls
    style = "" if width == WIDTH else f' style="{bound}-width:{width}px"'
    hint = f"{title}. Arrow keys read the values."
    return (
        f'<svg class=chart tabindex=0 role=img aria-label="{escape(hint)}" '
        f'viewBox="0 0 {width} {height}"{style}>{"".join(parts)}</svg>'
    )
