"""Pictures of probing: heat maps, distributions, example sentences; drawn from its JSON alone."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from llm_vtrans.report.charts import bar_chart, heat_map
from llm_vtrans.report.drawing import data_table, figure, number
from llm_vtrans.report.page import charts, page

NUM_BINS = 10
LEAST_DRAWN = 0.03  # of a query's attention: thinner lines only blacken the picture
LONGEST = 13  # characters of a token beside a line
ROW = 17  # height of a token, in SVG units
NAMES = {
    "special": "special or sink tokens",
    "current": "the current token",
    "previous": "the previous token",
    "next": "the next token",
    "keywords": "keywords",
}


def probe_section(probe: dict[str, Any]) -> str:
    """All pictures and figures of a probing as HTML."""
    return (
        f"<p>{escape(probe['protocol'])}</p>"
        + figures_table(probe)
        + charts(*(heat(probe, c) for c in shown(probe)))
        + charts(*(distribution(probe, c) for c in shown(probe) if is_mixed(probe)))
        + "<h3>Example sentences</h3>"
        "<p>Queries left, keys right; a line's width is the attention weight. Keywords are bold, "
        "special tokens in brackets. The heads are those of the strongest and of the weakest "
        "signal-to-noise ratio among the kept and the pruned, not picked by their pictures.</p>"
        + charts(*(sentence(probe, e) for e in probe["examples"]))
    )


def probe_page(probe: dict[str, Any]) -> str:
    """The probing as an HTML file of its own."""
    title = f"{probe['model']}: what its heads look at"
    return page(title, "", [("Kept against pruned heads", probe_section(probe))])


def shown(probe: dict[str, Any]) -> list[str]:
    """Categories that occur: a decoder never looks at the next token."""
    shares = np.array(probe["shares"])
    return [c for i, c in enumerate(probe["categories"]) if shares[..., i].max() > 0]


def figures_table(probe: dict[str, Any]) -> str:
    """Means, effect sizes and p-values; where all were kept only the rank correlations."""
    units = probe["unit_name"]
    rows = []
    for index, category in enumerate(probe["categories"]):
        if category not in shown(probe):
            continue
        test = probe["tests"][category]

        def show(name: str, form: str = ".4f", test: dict[str, Any] = test) -> str:
            return "—" if test[name] is None else f"{test[name]:{form}}"

        rows.append(
            (NAMES[category], show("kept"), show("pruned"),
             f"{probe['even'][index]:.4f}", show("cohens_d", "+.2f"), show("cliffs_delta", "+.2f"),
             show("p_value"), show("p_holm"), show("p_within_layers"), show("spearman", "+.2f"),
             show("p_spearman"))
        )  # fmt: skip
    header = ("share of attention on", "kept", "pruned", "if spread evenly", "Cohen's d",
              "Cliff's delta", "p", "p (Holm)", "p within layers", "Spearman with signal",
              "its p")  # fmt: skip
    kept = np.array(probe["units_kept"])
    count = f"{int(kept.sum())} kept and {int((~kept).sum())} pruned units ({units})"
    return (
        f"<div class=scroll>{data_table(header, rows)}</div>"
        f"<p class=note>{escape(count)}. p: two-sided permutation tests; Holm: corrected for the "
        "categories; within layers: labels exchanged inside a layer only. Positive effect sizes: "
        "kept heads look there more. The signal is the "
        "mask's signal-to-noise ratio: a positive correlation says that the masks value heads "
        "which look there.</p>"
    )


def is_mixed(probe: dict[str, Any]) -> bool:
    """Whether there are both kept and pruned units."""
    kept = np.array(probe["units_kept"])
    return bool(kept.any() and not kept.all())


def heat(probe: dict[str, Any], category: str) -> str:
    """Layers x heads, pruned heads crossed out."""
    index = probe["categories"].index(category)
    values = [[head[index] for head in layer] for layer in probe["shares"]]
    pruned = [[not kept for kept in layer] for layer in probe["heads_kept"]]
    return heat_map(
        f"Attention on {NAMES[category]}", "layer", "head", values, pruned,
        "Darker is more; crossed heads were pruned.",
    )  # fmt: skip


def distribution(probe: dict[str, Any], category: str) -> str:
    """Histogram of the units' shares, kept against pruned."""
    index = probe["categories"].index(category)
    shares = np.array(probe["unit_shares"])[..., index]
    kept = np.array(probe["units_kept"])
    edges = np.linspace(0, max(float(shares.max()), 1e-9), NUM_BINS + 1)
    series = []
    for name, chosen in (("kept", shares[kept]), ("pruned", shares[~kept])):
        counts = np.histogram(chosen, edges)[0]
        series.append((name, [100.0 * int(n) / max(len(chosen), 1) for n in counts]))
    decimals = max(2, 1 - math.floor(math.log10(edges[1])))  # so that neighbours differ
    labels = [f"{edge:.{decimals}f}" for edge in edges[:-1]]
    return bar_chart(
        f"Attention on {NAMES[category]}: kept against pruned", "share of attention, from",
        "% of units", labels, series,
    )  # fmt: skip


def sentence(probe: dict[str, Any], example: dict[str, Any]) -> str:
    """One head's attention over a sentence as lines between two columns of tokens."""
    tokens, weights = example["tokens"], example["weights"]
    height = ROW * len(tokens) + 30
    state = "kept" if example["is_kept"] else "pruned"
    parts = [
        '<text class=axis x="95" y="14" text-anchor=end>query</text>'
        '<text class=axis x="265" y="14">key</text>'
    ]
    lines = []
    for q, row in enumerate(weights):
        for k, weight in enumerate(row):
            if weight >= LEAST_DRAWN:
                label = f"{tokens[q]['text']} looks at {tokens[k]['text']}: {number(weight)}"
                lines.append((q, k, label, weight))
                parts.append(
                    f'<path class="mark s0" d="M100 {y_of(q)}L260 {y_of(k)}" fill=none '
                    f'style="stroke-width:{4 * weight:.2f};'
                    f'stroke-opacity:{0.25 + 0.75 * weight:.2f}" '
                    f'data-label="{escape(label)}"><title>{escape(label)}</title></path>'
                )
    for i, token in enumerate(tokens):
        text = token["text"]
        text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        is_bare = token["is_special"] and not text.startswith(("[", "<"))  # [CLS] has its own
        text = f"[{text}]" if is_bare else text
        style = ' style="font-weight:700"' if token["is_keyword"] else ""
        for x, anchor in ((95, "end"), (265, "start")):
            parts.append(
                f'<text x="{x}" y="{y_of(i) + 4}" text-anchor={anchor}{style}>{escape(text)}</text>'
            )
    title = f"Layer {example['layer']}, head {example['head']}: {state}"
    drawing = (
        f'<svg class=chart tabindex=0 role=img aria-label="{escape(title)}. Arrow keys read the '
        f'values." viewBox="0 0 360 {height}">{"".join(parts)}</svg>'
    )
    strongest = sorted(lines, key=lambda line: -line[3])[:40]
    table = data_table(
        ("query", "key", "weight"),
        [(tokens[q]["text"], tokens[k]["text"], number(w)) for q, k, _, w in strongest],
    )
    shares = ", ".join(f"{c} {example['shares'][i]:.2f}" for i, c in enumerate(probe["categories"]))
    return figure(title, drawing, table, f"Shares over the whole text: {shares}.")


def y_of(position: int) -> int:
    """Height of a token's line."""
    return 32 + ROW * position
