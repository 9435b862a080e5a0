"""The report: what it reads, what it draws, that it escapes."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.comparison.report import Figure, Row, write
from llm_vtrans.errors import UserError
from llm_vtrans.probe.pictures import distribution, sentence
from llm_vtrans.report.build import comparison_page, run_page
from llm_vtrans.report.charts import bar_chart, heat_map, xy_chart
from llm_vtrans.report.command import report
from llm_vtrans.report.drawing import Series, number
from llm_vtrans.report.record import RunRecord

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
        "headline": "perplexity",
        "scores": {"dense": {"perplexity": 10.0}, "pruned": {"perplexity": 12.5}},
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
        json.dumps(
            {"step": s, "loss": 1.5 - s, "sparsity": 0.1 * s, "target": 0.5, "multiplier": s}
        )
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
        comparison(EVIL, folder=folder / "compare")
    if place == "scores":
        metric = {"higher_is_better": True, "dense": {"value": 0.5}, "pruned": {"value": 0.4}}
        content = {"results": {EVIL: {"metrics": {"acc": metric}}}}
        (folder / "scores.json").write_text(json.dumps(content))
    html = run_page(RunRecord.read(folder), EVIL if place == "folder" else "run")
    parsed(html)
    assert EVIL not in html and "&lt;script&gt;" in html
    assert len(re.findall("<script", html)) == 1


def comparison(*methods, folder):
    """What eval/compare.py writes: each method at two sizes, one budget out of reach."""
    rows = [
        Row(method, "stock", recovery, sparsity, 1,
            {"ppl wiki": Figure(9.0 + i + 10 * sparsity, None), "excess wiki": Figure(0.1, None),
             "num_params": Figure(1000 * (1 - sparsity), None), "seconds": Figure(1.0, None)})
        for i, method in enumerate(methods) for recovery in ("none", "least-squares")
        for sparsity in (0.2, 0.5)
    ]  # fmt: skip
    dense = Row("dense", "-", "none", 0.0, 1, {"ppl wiki": Figure(8.0, None),
                                               "num_params": Figure(1000, None)})  # fmt: skip
    folder.mkdir(parents=True)
    out_of_reach = Row("flap", "stock", "none", 0.99, 0, {}, "unreachable")
    write([dense, *rows, out_of_reach], "windows", {}, folder)


@pytest.mark.parametrize("place", ["run/compare", "named"])
def test_quality_against_size_of_a_real_comparison(tmp_path, place):
    run = write_run(tmp_path / "run")
    methods = ("ours", "random", "magnitude", EVIL)
    comparison(*methods, folder=tmp_path / place)
    named = tmp_path / "named" / "table.json" if place == "named" else None
    record = RunRecord.read(run, comparison=named)
    assert [(r.method, r.num_params, dict(r.perplexity)) for r in record.comparison][:3] == [
        ("dense", 1000, {"wiki": 8.0}),
        ("ours", 800, {"wiki": 11.0}),
        ("ours", 500, {"wiki": 14.0}),
    ]
    assert "ours, least-squares" in {r.method for r in record.comparison}
    html = run_page(record, "run")
    parsed(html)
    assert "Perplexity on wiki against size" in html and EVIL not in html
    keys = re.findall(r"<li><svg width=30 [^>]*>(.*?)</svg>", html[html.index("on wiki") :])[:9]
    assert len(keys) == len(set(keys)) == 9  # nine series, told apart without colours too
    shapes = {re.sub(r'class="[^"]*"', "", key) for key in keys}
    assert len(shapes) == 9


def test_special_tokens_have_one_pair_of_brackets(tmp_path):
    add_probe(tmp_path)
    probe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    example = probe["examples"][0]
    assert ">[long]</text>" in sentence(probe, example)
    example["tokens"][1]["text"] = "[CLS]"
    assert ">[CLS]</text>" in sentence(probe, example)


@pytest.mark.parametrize("top", [1.0, 0.02])
def test_bars_of_small_shares_have_names_of_their_own(tmp_path, top):
    run = write_run(tmp_path / "run")
    add_probe(run)
    probe = json.loads((run / "probe" / "probe.json").read_text())
    probe["unit_shares"] = (np.array(probe["unit_shares"]) * top).tolist()
    html = distribution(probe, "special")
    names = re.findall(r"<tr><th scope=row>([^<]*)", html)
    assert len(names) == len(set(names)) == 10


@pytest.mark.parametrize("content", [[], {}, {"rows": [5, {"method": "x"}]}, {"rows": 3}])
def test_a_comparison_that_is_none_leaves_the_section_out(tmp_path, content):
    run = write_run(tmp_path / "run")
    (tmp_path / "table.json").write_text(json.dumps(content))
    record = RunRecord.read(run, comparison=tmp_path / "table.json")
    assert record.comparison == () and "against size" not in run_page(record, "run")


def test_headline_of_a_task_model(tmp_path):
    run = write_run(tmp_path / "run")
    content = json.loads((run / "vtrans.json").read_text())
    del content["perplexity"]
    content["score"] = {"dense": 0.9, "hardened": 0.7, "pruned": 0.85, "protocol": "accuracy of x"}
    content["headline"] = "accuracy"
    content["scores"] = {"dense": {"accuracy": 0.9, "f1": 0.8}, "pruned": {"accuracy": 0.85,
                                                                          "f1": 0.75}}  # fmt: skip
    content["latency"] = {"ms for 8 tokens": {"dense": 4.0, "pruned": 2.5}}
    (run / "vtrans.json").write_text(json.dumps(content))
    html = run_page(RunRecord.read(run), "run")
    assert "accuracy 0.900 to 0.850" in html and "higher is better" in html
    assert "0.750" in html and "accuracy of x" in html
    assert "hard masks on the dense model</th><td>0.7" in html
    assert "latency, ms for 8 tokens" in html and "0.625" in html
    assert "perplexity" not in html.split("<script>")[0].lower()


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
    with pytest.raises(UserError, match="name one of its results: one, two"):
        report([str(tmp_path)])


def test_runs_under_different_protocols_are_told_apart(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / name, name)) for name in ("one", "two")]
    assert "do not compare" in comparison_page(runs)
    assert "do not compare" not in comparison_page([runs[0], runs[0]])
