"""The report: what it reads, what it draws, that it escapes."""

import json
import re
from html.parser import HTMLParser

import pytest

from llm_vtrans.errors import UserError
from llm_vtrans.report.build import comparison_page, run_page
from llm_vtrans.report.charts import bar_chart, heat_map, xy_chart
from llm_vtrans.report.command import report
from llm_vtrans.report.drawing import Series, number
from llm_vtrans.report.record import RunRecord, comparison_rows

EVIL = '<script>alert("x")</script>'


def manifest(name="dense"):
    return {
        "method": "faster-vtrans",
        "source": {"name": name, "revision": None, "sha256": "0" * 64},
        "params": {"before": 1000, "after": 500},
        "macs": {"before": 4000, "after": 1000, "seq_len": 8},
        "bytes": {"before": 4000, "after": 2000},
        "kept": {"hidden": 8, "heads": [2, 0], "ffn": [3, 4], "removed_sublayers": ["1.attention"]},
        "units": {"hidden": 16, "heads": 4, "ffn": 8},
        "parts": {"embeddings": {"before": 400, "after": 300}, "ffn": {"before": 6, "after": 2}},
        "layout": "per-layer",
        "perplexity": {"dense": 10.0, "pruned": 12.5, "protocol": f"windows of {name}"},
        "settings": {"log_every": 2},
        "command": f"llm-vtrans prune --model {name}",
        "phases": {"train": {"seconds": 1.0, "peak_rss": 2**30, "peak_device": 0}},
        "versions": {"torch": "2"},
        "sha256": {"model.safetensors": "1" * 64},
    }


def write_run(folder, name="dense"):
    folder.mkdir()
    (folder / "vtrans.json").write_text(json.dumps(manifest(name)))
    lines = [
        json.dumps({"step": s, "loss": 1.5 - s, "sparsity": 0.1 * s, "target": 0.5, "lambda_1": s})
        for s in (2, 4)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    return folder


def add_probe(folder, num_layers=12, num_heads=12):
    """What `llm-vtrans probe` leaves: every second head pruned, two heads drawn."""
    categories = ["special", "current", "previous", "next", "keywords"]
    shares = [[[(i + j + c) % 7 / 10 for c in range(5)] for j in range(num_heads)]
              for i in range(num_layers)]  # fmt: skip
    kept = [[(i + j) % 2 == 0 for j in range(num_heads)] for i in range(num_layers)]
    test = {"kept": 0.3, "pruned": 0.2, "cohens_d": 0.5, "cliffs_delta": 0.25, "p_value": 0.01,
            "p_within_layers": None, "p_holm": 0.5, "spearman": 0.1, "p_spearman": 0.4}  # fmt: skip
    words = ("extraordinarily", "long", "words", EVIL)
    tokens = [{"text": w, "is_special": w == "long", "is_keyword": w == "words"} for w in words]
    weights = [[1.0 if q == k else 0.0 for k in range(4)] for q in range(4)]
    drawn = {"layer": 0, "head": 1, "shares": [0.1] * 5, "tokens": tokens, "weights": weights}
    probe = {
        "model": "dense", "run": "run", "protocol": "Attention.", "unit_name": "attention heads",
        "categories": categories, "even": [0.1] * 5, "shares": shares, "heads_kept": kept,
        "unit_shares": shares, "units_kept": kept, "signal": [[0.0]],
        "tests": dict.fromkeys(categories, test),
        "examples": [{**drawn, "is_kept": is_kept} for is_kept in (True, False)],
    }  # fmt: skip
    (folder / "probe").mkdir()
    (folder / "probe" / "probe.json").write_text(json.dumps(probe))


class Balanced(HTMLParser):
    """Checks that what is opened is closed, and collects every reference to elsewhere."""

    EMPTY = ("meta", "link")

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        links = {value for name, value in attrs if name in ("src", "href")}
        self.outside += [link for link in links if not link.startswith(("#", "data:"))]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    checker = Balanced()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_one_file_that_needs_nothing_else(tmp_path):
    record = RunRecord.read(write_run(tmp_path / "run"))
    html = run_page(record, "run")
    assert parsed(html).outside == []
    assert [m["step"] for m in record.metrics] == [2, 4]  # the line cut short is left out
    assert "1,000" in html and "50.0% removed" in html and "1.attention" in html
    assert "What the heads look at" not in html  # no probing ran: no empty section


@pytest.mark.parametrize("place", ["model", "comparison", "scores", "folder"])
def test_names_from_outside_are_escaped(tmp_path, place):
    folder = write_run(tmp_path / "run", EVIL if place == "model" else "dense")
    if place == "comparison":
        rows = [{"method": EVIL, "num_params": 5, "perplexity": {EVIL: 3.0}}]
        (folder / "compare.json").write_text(json.dumps(rows))
    if place == "scores":
        metric = {"higher_is_better": True, "dense": {"value": 0.5}, "pruned": {"value": 0.4}}
        content = {"results": {EVIL: {"metrics": {"acc": metric}}}}
        (folder / "scores.json").write_text(json.dumps(content))
    html = run_page(RunRecord.read(folder), EVIL if place == "folder" else "run")
    parsed(html)
    assert EVIL not in html and "&lt;script&gt;" in html
    assert len(re.findall("<script", html)) == 1


def test_comparison_rows_of_either_form():
    new = {"method": "flap", "sparsity": 0.5, "num_params": 7, "perplexity": {"wiki": 3.5}}
    detailed = {**new, "perplexity": {"wiki": {"value": 4.5, "stderr": 0.1}}}
    old = {"method": "random", "layout": "stock", "parameters": "1,234", "test": "61.20"}
    incomplete = [{"method": "x"}, {"method": "y", "num_params": 3, "perplexity": {}}, 5]
    rows = list(comparison_rows([new, detailed, old, *incomplete]))
    assert [(r.method, r.num_params, dict(r.perplexity)) for r in rows] == [
        ("flap", 7, {"wiki": 3.5}),
        ("flap", 7, {"wiki": 4.5}),
        ("random (stock)", 1234, {"test": 61.2}),
    ]
    assert list(comparison_rows({"protocol": "x", "rows": [new]})) == rows[:1]


def test_charts_leave_out_what_cannot_be_drawn():
    assert xy_chart("t", "x", "y", [Series("a", [(1, float("nan"))])]) == ""
    chart = xy_chart("t", "x", "y", [Series("a", [(i, i) for i in range(5000)])])
    assert chart.count("data-label") <= 152 and "4,999" in chart  # thinned, the last one stays
    assert "polyline" in xy_chart("t", "x", "y", [Series("a", [(1, 2.0)])], is_log=True)
    parsed(bar_chart("t", "x", "y", ["0"], [("a", [0]), ("b", [0])], is_stacked=True))
    cells = heat_map("t", "layer", "head", [[0.0, 1.0]], [[False, True]])
    assert cells.count("class=cross") == 1 and "head 1: 1, pruned" in cells


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (1234567, "1,234,567"), (0.12345, "0.1235"), (34.1475, "34.15"),
                        (float("nan"), "—"), (1.5e-7, "1.50e-07"), (12345.6, "12,346")]
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_command_writes_one_or_compares_several(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    report([str(one)])
    assert (one / "report" / "index.html").is_file()
    with pytest.raises(UserError, match="name it by --output"):
        report([str(one), str(two)])
    report([str(one), str(two), "--output", str(tmp_path / "compare.html")])
    html = (tmp_path / "compare.html").read_text()
    assert parsed(html).outside == [] and "one: command" in html and "two: command" in html
    assert capsys.readouterr().out.split() == [
        str(one / "report" / "index.html"), str(tmp_path / "compare.html"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="name a folder that prune wrote"):
        report([str(tmp_path)])


def test_runs_under_different_protocols_are_told_apart(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / name, name)) for name in ("one", "two")]
    assert "do not compare" in comparison_page(runs)
    assert "do not compare" not in comparison_page([runs[0], runs[0]])
