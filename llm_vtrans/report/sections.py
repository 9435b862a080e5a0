"""The parts of a run's report: each takes the record and returns HTML, empty if it has nothing."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from llm_vtrans.record.manifest import score_of_stages
from llm_vtrans.report.charts import bar_chart, xy_chart
from llm_vtrans.report.drawing import Series, data_table, number
from llm_vtrans.report.page import charts, text_table
from llm_vtrans.report.record import RunRecord

NUM_BUCKETS = 64  # bars of the hidden dimensions
GIB = 2**30
COSTS = ("parameters", "MACs", "checkpoint", "latency")


def headline_rows(record: RunRecord) -> list[tuple[str, float, float, str]]:
    """Figures of dense and pruned: name, dense, pruned, and what is better."""
    manifest = record.manifest
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", manifest["params"]["before"], manifest["params"]["after"], "lower")
    ]
    if macs := manifest.get("macs"):
        name = f"MACs for {macs['seq_len']} tokens, G"
        rows.append((name, macs["before"] / 1e9, macs["after"] / 1e9, "lower"))
    if size := manifest.get("bytes"):
        rows.append(("checkpoint, MB", size["before"] / 1e6, size["after"] / 1e6, "lower"))
    for name, pair in (manifest.get("latency") or {}).items():
        if isinstance(pair, dict) and {"dense", "pruned"} <= pair.keys():
            rows.append((f"latency, {name}", pair["dense"], pair["pruned"], "lower"))
    scores = manifest.get("scores", {})
    for name, dense in scores.get("dense", {}).items():
        better = "lower" if name.endswith("perplexity") else "higher"
        rows.append((name.replace("_", "-"), dense, scores["pruned"][name], better))
    for task, result in record.scores.items():
        for metric, columns in result.get("metrics", {}).items():
            dense, pruned = columns.get("dense"), columns.get("pruned")
            if dense and pruned and None not in (dense["value"], pruned["value"]):
                better = {True: "higher", False: "lower"}.get(columns["higher_is_better"], "")
                rows.append((f"{task}, {metric}", dense["value"], pruned["value"], better))
    return rows


def headline_name(manifest: dict[str, Any]) -> str:
    """What the headline score is."""
    return str(manifest.get("headline", "perplexity")).replace("_", "-")


def score_text(value: float) -> str:
    """A score for people, with as many decimals as its differences need."""
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"


def lead(record: RunRecord) -> str:
    """One sentence: what became of the model."""
    manifest = record.manifest
    params, stages = manifest["params"], score_of_stages(manifest)
    share = 1 - params["after"] / params["before"]
    text = (
        f"{manifest['source']['name']}: {number(params['before'])} parameters to "
        f"{number(params['after'])} ({100 * share:.1f}% removed, embeddings counted)"
    )
    if {"dense", "pruned"} <= stages.keys():
        name = headline_name(manifest)
        text += f"; {name} {score_text(stages['dense'])} to {score_text(stages['pruned'])}"
    layout = f"Layout {manifest['layout']}, method {manifest['method']}."
    return f"<p class=lead>{escape(text)}.</p><p>{escape(layout)}</p>"


def headline(record: RunRecord) -> str:
    """Dense against pruned, as a table and as bars of what is left."""
    rows = headline_rows(record)
    costs = [r for r in rows if r[0].startswith(COSTS)]
    texts = [number if r in costs else score_text for r in rows]
    cells = [
        (name, show(dense), show(pruned), f"{pruned / dense:.3f}" if dense else "—",
         f"{better} is better" if better else "")
        for (name, dense, pruned, better), show in zip(rows, texts, strict=True)
    ]  # fmt: skip
    table = data_table(("", "dense", "pruned", "ratio", ""), cells)
    bars = bar_chart(
        "What is left of the dense model",
        "cost",
        "% of dense",
        [name.split(",")[0].split(" for")[0] for name, *_ in costs],
        [("pruned", [100 * pruned / dense for _, dense, pruned, _ in costs])],
        top=100,
    )
    protocol = score_of_stages(record.manifest).get("protocol", "")
    name = headline_name(record.manifest).capitalize()
    note = f"<p class=note>{escape(name)}: {escape(protocol)}.</p>" if protocol else ""
    return f'<div class="scroll headline">{table}</div>{note}{charts(bars)}'


def training(record: RunRecord) -> str:
    """Curves of the training: losses, sparsity against its target, multipliers, KL."""

    def line(name: str, key: str) -> Series:
        points = [(m["step"], m[key]) for m in record.metrics if key in m]
        return Series(name, points)

    every = record.manifest["settings"].get("log_every", 1)
    return charts(
        xy_chart(
            "Losses", "step", "nats", [line("loss", "loss"), line("distillation", "distillation"),
             line("hidden states", "hidden"), line("task", "task"),
             line("budget penalty", "penalty")], f"Single batches, every {every} steps.",
        ),
        xy_chart(
            "Expected sparsity against its target", "step", "share removed",
            [line("expected", "sparsity"), line("target", "target")],
        ),
        xy_chart(
            "Multiplier of the budget", "step", "nats per share of it",
            [line("multiplier", "multiplier")],
        ),
        xy_chart("KL of the masks", "step", "nats", [line("KL", "kl")]),
        xy_chart("Throughput", "step", "tokens/s", [line("rate", "tokens_per_second")]),
    )  # fmt: skip


def kept(record: RunRecord) -> str:
    """Kept heads and FFN units per layer, kept hidden dimensions by position."""
    manifest = record.manifest
    shape, units = manifest.get("kept"), manifest.get("units", {})
    if not shape:
        return ""
    layers = [str(i) for i in range(len(shape["heads"]))]
    figures = [
        _kept_bars("Attention heads kept per layer", "key/value groups", layers,
                   shape["heads"], units.get("heads")),
        _kept_bars("FFN units kept per layer", "units", layers, shape["ffn"], units.get("ffn")),
        _hidden_bars(record),
    ]  # fmt: skip
    gone = shape.get("removed_sublayers") or []
    note = f"<p>Removed as a whole: {escape(', '.join(gone))}.</p>" if gone else ""
    return charts(*figures) + note


def _kept_bars(
    title: str, unit: str, layers: list[str], counts: list[int], dense: int | None
) -> str:
    """Kept counts with the removed ones stacked above."""
    series = [("kept", counts)]
    if dense is not None:
        series.append(("removed", [dense - c for c in counts]))
    return bar_chart(title, "layer", unit, layers, series, is_stacked=True, top=dense)


def _hidden_bars(record: RunRecord) -> str:
    """Share of kept hidden dimensions by position: principal directions where rotated."""
    flags = record.hidden
    if not flags:
        return ""
    size = math.ceil(len(flags) / NUM_BUCKETS)
    groups = [flags[i : i + size] for i in range(0, len(flags), size)]
    names = [str(i * size) for i in range(len(groups))]
    shares = [100 * sum(g) / len(g) for g in groups]
    width = f" Each bar is {size} of them." if size > 1 else ""
    order = (
        "Positions are principal directions, the strongest first."
        if record.manifest.get("rotation") == "pca"
        else "Positions are the dense model's own."
    )
    return bar_chart(
        f"Hidden dimensions kept: {sum(flags):,} of {len(flags):,}", "dimension", "% kept",
        names, [("kept", shares)], order + width, top=100,
    ).replace("<figure>", "<figure class=wide>", 1)  # fmt: skip


def where(record: RunRecord) -> str:
    """Parameters and MACs by part of the network."""
    figures = []
    for key, title in (("parts", "parameters"), ("mac_parts", "MACs")):
        if not (parts := record.manifest.get(key)):
            continue
        series = [(name, [pair["before"], pair["after"]]) for name, pair in parts.items()]
        figures.append(
            bar_chart(f"Where the {title} went", "model", title, ["dense", "pruned"], series,
                      is_stacked=True)
        )  # fmt: skip
    return charts(*figures)


def quality(record: RunRecord) -> str:
    """Perplexity against size for every text of a comparison."""
    rows = record.comparison
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    figures = []
    for text in texts:
        methods = list(dict.fromkeys(row.method for row in rows if text in row.perplexity))
        series = [
            Series(
                method,
                sorted((row.num_params, row.perplexity[text]) for row in rows
                       if row.method == method and text in row.perplexity),
            )
            for method in methods
        ]  # fmt: skip
        figures.append(
            xy_chart(f"Perplexity on {text} against size", "parameters", "perplexity", series,
                     "Logarithmic perplexity; lower is better.", is_log=True)
        )  # fmt: skip
    return charts(*figures)


def layouts(record: RunRecord) -> str:
    """What the masks cost and what the other layout would have cost, in the headline score."""
    stages = score_of_stages(record.manifest)
    names = {
        "dense": "dense model",
        "hardened": "hard masks on the dense model",
        "tuned": "the same after tuning",
        "exported": "exported model, before recovery",
        "pruned": "exported model, loaded again",
        "other_layout": "the same masks in the other layout",
    }
    cells = [(text, score_text(stages[key])) for key, text in names.items() if key in stages]
    header = ("", headline_name(record.manifest))
    return f"<div class=scroll>{data_table(header, cells)}</div>" if cells else ""


def probing(record: RunRecord) -> str:
    """Where the dense model's heads look, kept against pruned."""
    if not record.probe:
        return ""
    from llm_vtrans.probe.pictures import probe_section

    return probe_section(record.probe)


def reproduce(record: RunRecord) -> str:
    """Exact command, versions, settings, time and memory."""
    manifest = record.manifest
    settings = [(k, str(v)) for k, v in manifest.get("settings", {}).items() if v is not None]
    phases = [
        (name, f"{p['seconds']:.1f}", f"{p['peak_rss'] / GIB:.2f}", f"{p['peak_device'] / GIB:.2f}")
        for name, p in manifest.get("phases", {}).items()
    ]
    source = manifest["source"]
    identity = [("model", str(source["name"])), ("revision", str(source.get("revision") or "—")),
                ("sha256", str(source["sha256"]))]  # fmt: skip
    header = ("phase", "seconds", "peak memory, GiB", "peak device memory, GiB")
    return (
        f"<pre>{escape(manifest.get('command', ''))}</pre>"
        f"<h3>Versions</h3>{text_table(list(manifest.get('versions', {}).items()))}"
        f"<h3>Dense checkpoint</h3>{text_table(identity)}"
        f"<h3>Time and memory</h3><div class=scroll>{data_table(header, phases)}</div>"
        f"<details><summary>All settings</summary>{text_table(settings)}</details>"
        f"<details><summary>SHA-256 of the written files</summary>"
        f"{text_table(list(manifest.get('sha256', {}).items()))}</details>"
    )


def side_by_side(records: list[RunRecord]) -> str:
    """Several runs in one table, rows in the order of the first run that has them."""
    columns: list[dict[str, Any]] = []
    for record in records:
        params = record.manifest["params"]
        cells: dict[str, Any] = {
            "layout": record.manifest["layout"],
            "removed": f"{100 * (1 - params['after'] / params['before']):.1f}%",
        }
        for name, dense, pruned, _ in headline_rows(record):
            cells[name] = f"{number(pruned)} (dense {number(dense)})"
        columns.append(cells)
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    rows = [(name, *(str(cells.get(name, "—")) for cells in columns)) for name in names]
    table = data_table(("", *(r.name for r in records)), rows)
    return f"<div class=scroll>{table}</div>"


def overlays(records: list[RunRecord]) -> str:
    """The runs' perplexity against size, training curves and shapes in common charts."""

    def curve(key: str) -> list[Series]:
        return [
            Series(r.name, [(m["step"], m[key]) for m in r.metrics if key in m]) for r in records
        ]

    def per_layer(key: str) -> list[Series]:
        return [Series(r.name, list(enumerate(r.manifest["kept"][key]))) for r in records]

    points = [
        Series(
            r.name,
            [(r.manifest["params"]["after"], score_of_stages(r.manifest)["pruned"])],
            is_line=False,
        )
        for r in records
        if "pruned" in score_of_stages(r.manifest)
    ]
    protocols = {score_of_stages(r.manifest).get("protocol") for r in records}
    names = list(dict.fromkeys(headline_name(r.manifest) for r in records))
    is_log = all(name.endswith("perplexity") for name in names)
    note = (
        f"{protocols.pop()}."
        if len(protocols) == 1
        else "The runs' scores follow different protocols: do not compare them."
    )
    return charts(
        xy_chart("Quality against size", "parameters", ", ".join(names), points, note, is_log),
        xy_chart("Distillation loss", "step", "nats", curve("distillation")),
        xy_chart("Expected sparsity", "step", "share removed", curve("sparsity")),
        xy_chart("Key/value groups kept", "layer", "groups", per_layer("heads")),
        xy_chart("FFN units kept", "layer", "units", per_layer("ffn")),
    )
