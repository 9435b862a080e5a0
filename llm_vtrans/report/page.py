"""The HTML page around charts: styles, hatching patterns and the script, all inline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{--ink:#1a1a1a;--soft:#555;--rule:#ccc;--ground:#fff;--panel:#f6f6f4;--accent:#0b4f8a}
*{box-sizing:border-box}
body{margin:0 auto;max-width:78rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
 color:var(--ink);background:var(--ground)}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;border-bottom:2px solid var(--ink);margin:2rem 0 .8rem;padding-bottom:.2rem}
h3{font-size:1rem;margin:1rem 0 .4rem}
p{max-width:60rem}.lead{font-size:1.1rem}.note{color:var(--soft);font-size:.85rem;margin:.3rem 0}
a{color:var(--accent)}nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem;
 margin-bottom:1rem}
.wide{grid-column:1/-1}
figure{margin:0;padding:.7rem;background:var(--panel);border:1px solid var(--rule);min-width:0}
figcaption{font-weight:600}
.scroll{overflow-x:auto}
svg.chart{display:block;width:100%;max-width:640px;height:auto;background:#fff}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .axis{font-weight:600}
.grid{stroke:#ddd;fill:none}.axisline{stroke:#000;fill:none}
.line{fill:none;stroke-width:2}.point{stroke-width:1.2;fill:#fff}.quiet{opacity:0}
.s0{stroke:#0b4f8a}.s1{stroke:#b3410e}.s2{stroke:#222}.s3{stroke:#137333}.s4{stroke:#7b1fa2}
.s5{stroke:#8a6d00}.point.s0{fill:#0b4f8a}.point.s2{fill:#222}
.bar{stroke:#222;stroke-width:.6}.b0{fill:#0b4f8a}.b1{fill:url(#h1)}.b2{fill:url(#h2)}
.b3{fill:url(#h3)}.b4{fill:#fff}.b5{fill:url(#h5)}
.cell{stroke:#999;stroke-width:.4}.rim,.cross{fill:none;pointer-events:none}
.rim{stroke:#fff;stroke-width:4}.cross{stroke:#8a0000;stroke-width:1.8}
.mark.on{stroke:#000;stroke-width:3;opacity:1}
:focus-visible{outline:3px solid #c25e00;outline-offset:2px}
output{display:block;min-height:1.5em;font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem .9rem;list-style:none;margin:.3rem 0;padding:0;
 font-size:.85rem}.legend li{display:flex;align-items:center;gap:.3rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--rule);padding:.25rem .7rem;text-align:right;vertical-align:top;
 white-space:nowrap}
th[scope=row],th:first-child{text-align:left;font-weight:500}
th[scope]{white-space:normal}.text th[scope=row]{white-space:nowrap}
table.text td{text-align:left;white-space:normal;overflow-wrap:anywhere}
@media(max-width:40rem){table{font-size:.82rem}th,td{padding:.25rem .2rem}
 .headline tr>:last-child{display:none}}
details{font-size:.9rem}details .scroll{max-height:20rem;overflow:auto}
summary{cursor:pointer;padding:.3rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);padding:.7rem;
 border:1px solid var(--rule)}
.tokens{line-height:2.1}.tokens span{padding:.1rem .15rem;border-bottom:0 solid #000}
@media print{body{max-width:none}figure,tr{break-inside:avoid}}
"""

HATCHING = """
<svg width=0 height=0 aria-hidden=true style="position:absolute"><defs>
<pattern id=h1 width=6 height=6 patternUnits=userSpaceOnUse patternTransform="rotate(45)">
<rect width=6 height=6 fill="#e3e3e3"/><path d="M0 0V6" stroke="#777" stroke-width=2 /></pattern>
<pattern id=h2 width=6 height=6 patternUnits=userSpaceOnUse patternTransform="rotate(-45)">
<rect width=6 height=6 fill="#fff"/><path d="M0 0V6" stroke="#b3410e" stroke-width=3 /></pattern>
<pattern id=h3 width=6 height=6 patternUnits=userSpaceOnUse>
<rect width=6 height=6 fill="#fff"/><circle cx=3 cy=3 r=1.5 fill="#222"/></pattern>
<pattern id=h5 width=6 height=6 patternUnits=userSpaceOnUse>
<rect width=6 height=6 fill="#fff"/><path d="M0 3H6M3 0V6" stroke="#137333"/></pattern>
</defs></svg>
"""

# One stop of the tab key per chart; the arrow keys then walk its marks.
SCRIPT = """
for (const chart of document.querySelectorAll('svg.chart')) {
  const marks = [...chart.querySelectorAll('.mark')];
  const said = chart.closest('figure').querySelector('output');
  let at = -1;
  const show = (index) => {
    if (at >= 0) marks[at].classList.remove('on');
    at = index;
    if (at >= 0) marks[at].classList.add('on');
    said.textContent = at >= 0 ? marks[at].dataset.label : '';
  };
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1};
  chart.addEventListener('keydown', (event) => {
    let next = null;
    if (event.key in steps) next = Math.max(0, Math.min(marks.length - 1, at + steps[event.key]));
    if (event.key === 'Home') next = 0;
    if (event.key === 'End') next = marks.length - 1;
    if (next === null || !marks.length) return;
    event.preventDefault();
    show(next);
  });
  chart.addEventListener('blur', () => show(-1));
  marks.forEach((mark, index) => mark.addEventListener('pointerenter', () => show(index)));
}
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML file that loads nothing from anywhere.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: heading (plain text) and body (HTML); those without a body are left out.
    """
    sections = [(heading, body) for heading, body in sections if body]
    links = "".join(
        f'<li><a href="#part{i}">{escape(heading)}</a></li>'
        for i, (heading, _) in enumerate(sections)
    )
    bodies = "".join(
        f"<section id=part{i} aria-labelledby=h{i}x><h2 id=h{i}x>{escape(heading)}</h2>{body}"
        "</section>"
        for i, (heading, body) in enumerate(sections)
    )
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width,initial-scale=1">'
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f'<link rel=icon href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{HATCHING}"
        f"<header><h1>{escape(title)}</h1>{lead}</header>"
        f"<nav aria-label=Sections><ul>{links}</ul></nav>"
        f"<main>{bodies}</main><script>{SCRIPT}</script></body></html>\n"
    )


def charts(*figures: str) -> str:
    """Figures in a grid of as many columns as fit; empty ones are left out."""
    shown = [f for f in figures if f]
    return f"<div class=charts>{''.join(shown)}</div>" if shown else ""


def text_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and texts, escaped."""
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows
    )
    return f"<div class=scroll><table class=text><tbody>{body}</tbody></table></div>"
