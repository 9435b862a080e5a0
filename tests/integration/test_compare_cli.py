"""eval/compare.py as its user runs it: tables, resuming, refusals, a cell that dies."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from eval import compare as command
from eval.comparison import cell as cells
from eval.comparison import plots, report
from eval.comparison.overlap import check_apart
from eval.comparison.processes import chains
from llm_vtrans.errors import UserError
from tests.runs import SEQ_LEN, children, start, write_inputs
from tests.tiny import VOCAB_SIZE

seeds = st.integers(0, 2)
SAMPLES = cells.SELECTION_WINDOWS + cells.CHOICE_WINDOWS


def test_what_is_given_twice_is_computed_once(tmp_path: Path) -> None:
    """A second one would count as another seed."""
    given = [
        "--sparsity",
        "0.5",
        "0.3",
        "0.5",
        "--methods",
        "random",
        "random",
        "--seeds",
        "1",
        "1",
    ]
    args = command.parse([*given, "--output", str(tmp_path)])
    assert (args.sparsity, args.methods, args.seeds) == ([0.5, 0.3], ["random"], [1])


def start_compare(folder: Path, *more: str, text: str = "other.txt") -> subprocess.Popen[str]:
    """Starts it on the inputs in `folder`."""
    arguments = [
        *("--model", str(folder / "model"), "--data", str(folder / "text.txt")),
        *("--texts", str(folder / text), "--output", str(folder / "report")),
        *("--samples", str(SAMPLES), "--context-length", str(SEQ_LEN), *more),
    ]
    return start(arguments, entry="eval/compare.py")


def compare(folder: Path, *more: str, text: str = "other.txt") -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    process = start_compare(folder, *more, text=text)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A tiny model, calibration text and another text."""
    write_inputs(tmp_path, num_paragraphs=80)
    draw = random.Random(1)
    letters = [chr(33 + token) for token in range(1, VOCAB_SIZE - 2)]
    (tmp_path / "other.txt").write_text("".join(draw.choices(letters, k=400)))
    return tmp_path


@pytest.mark.slow
def test_table_resumes(inputs: Path) -> None:
    given = ["--sparsity", "0.3", "0.9", "--methods", "wanda-sp", "slicegpt"]
    given += ["--recover", "none", "least-squares"]
    first = compare(inputs, *given)
    assert first.returncode == 0, first.stderr
    table = json.loads((inputs / "report" / "table.json").read_text())
    rows = {(r["method"], r["sparsity"], r["recovery"]): r for r in table["rows"]}
    assert len(rows) == 1 + 2 * (2 + 1)  # SliceGPT is no plain network: no recovery
    metric = f"excess {inputs / 'other.txt'}"
    plain, recovered = (rows["wanda-sp", 0.3, r]["figures"] for r in ("none", "least-squares"))
    assert plain[metric] != recovered[metric] and plain["num_params"] == recovered["num_params"]
    assert rows["wanda-sp", 0.9, "none"]["figures"] == {}
    assert "unreachable" in rows["wanda-sp", 0.9, "none"]["note"]
    assert first.stdout.strip() == (inputs / "report" / "table.md").read_text().strip()
    if plots.is_available():
        assert len(list((inputs / "report").glob("*.png"))) == 2  # perplexity and excess

    # What is there stays as it is; what is missing comes back the same but for its cost.
    files = sorted((inputs / "report" / "cells").iterdir())
    lost = next(f for f in files if f.name.startswith("slicegpt-0.3"))
    before, stamps = json.loads(lost.read_text()), {f: f.stat().st_mtime_ns for f in files}
    lost.unlink()
    second = compare(inputs, *given)
    assert second.returncode == 0, second.stderr
    assert "slicegpt 0.3 stock, seed 0" in second.stderr and "wanda-sp" not in second.stderr
    after = json.loads(lost.read_text())
    assert after["perplexity"] == before["perplexity"] and after["cell"] == before["cell"]
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items() if f != lost)


@pytest.mark.slow
def test_cells_at_a_time_make_the_same_table(inputs: Path) -> None:
    """Of a training that several budgets and recoveries rest on, too."""
    given = ["--sparsity", "0.3", "0.5", "--methods", "ours", "magnitude", "--seeds", "0", "1"]
    given += ["--recover", "none", "least-squares"]
    tables = []
    for processes in ("3", "1"):
        result = compare(inputs, *given, "--processes", processes)
        assert result.returncode == 0, result.stderr
        rows = json.loads((inputs / "report" / "table.json").read_text())["rows"]
        costs = {"seconds", "peak_rss"}
        tables.append([{n: f for n, f in r["figures"].items() if n not in costs} for r in rows])
        (inputs / "report").rename(inputs / f"report{processes}")
    assert tables[0] == tables[1] and len(tables[0]) == 1 + 2 * 2 * 2
    assert all(figures for figures in tables[0])


@pytest.mark.slow
def test_ours_is_the_product(inputs: Path) -> None:
    """One training; the other budget comes from its masks, the perplexities from its exports.

    A recovery starts from what was tuned for the row without it.
    """
    given = ["--sparsity", "0.5", "0.3", "--methods", "ours", "--recover", "none", "least-squares"]
    result = compare(inputs, *given)
    assert result.returncode == 0, result.stderr
    runs = {}
    for folder in (inputs / "report" / "ours").iterdir():
        manifest = json.loads((folder / "vtrans.json").read_text())
        assert manifest["settings"]["round_to"] == "1"  # as all methods do, on every device
        assert result.stderr.count(f"result in {folder}\n") == 1
        runs[float(manifest["settings"]["sparsity"])] = manifest
    rows = json.loads((inputs / "report" / "table.json").read_text())["rows"]
    found = {(row["sparsity"], row["recovery"]): row["figures"] for row in rows}
    took = {
        sparsity: sum(p["seconds"] for name, p in manifest["phases"].items() if name != "score")
        for sparsity, manifest in runs.items()
    }
    assert set(runs) == {0.3, 0.5}
    for sparsity, manifest in runs.items():
        plain, recovered = found[sparsity, "none"], found[sparsity, "least-squares"]
        seconds = took[0.5] if sparsity == 0.5 else sum(took.values())
        assert seconds < plain["seconds"]["mean"] and seconds < recovered["seconds"]["mean"]
        assert plain["num_params"]["mean"] == manifest["params"]["after"]
        assert plain["num_params"] == recovered["num_params"]
    dense, other = (found[key]["num_params"]["mean"] for key in ((0.0, "none"), (0.3, "none")))
    assert 0.6 * dense < other <= 0.7 * dense


@pytest.mark.slow
def test_no_cell_outlives_a_killed_comparison(inputs: Path) -> None:
    """Nor does it go on in vain: the training is one that can be resumed."""
    write_inputs(inputs, num_paragraphs=20_000)
    given = ["--sparsity", "0.5", "--methods", "ours", "--samples", "100000"]
    process = start_compare(inputs, *given)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.kill()
    _, errors = process.communicate(timeout=300)  # ends when the cell has closed its side
    assert "stopped by SIGTERM; --resume continues" in errors


@pytest.mark.slow
def test_a_killed_cell_leaves_the_others_alone(inputs: Path) -> None:
    """As the system does where memory ends; the table says so, and so does the status."""
    write_inputs(inputs, num_paragraphs=20_000)
    given = ["--sparsity", "0.5", "--methods", "ours", "magnitude", "--samples", "100000"]
    process = start_compare(inputs, *given)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            break
    (cell,) = (cell for server in children(process.pid) for cell in children(server))
    os.kill(cell, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "1 entries failed" in errors
    assert "| ours | stock | none | - | - |" in output and "was killed by signal 9" in output
    rows = json.loads((inputs / "report" / "table.json").read_text())["rows"]
    assert {r["method"]: bool(r["figures"]) for r in rows}["magnitude"]


methods = st.sampled_from(["ours", "ours-no-reuse", "flap"])
recoveries = st.sampled_from(["none", "lora"])


@hypothesis.given(st.lists(st.tuples(methods, st.integers(1, 9), recoveries, seeds), unique=True))
def test_cells_are_in_one_chain_where_they_rest_on_one_result(
    drawn: list[tuple[str, int, str, int]],
) -> None:
    """And within one they keep their order; what trains comes first."""
    planned = [cells.Cell(m, n / 10, "stock", r, seed, "", "") for m, n, r, seed in drawn]
    found = chains(planned)
    results = {
        (cell.method, cell.seed, cell.method == "ours" or cell.sparsity): chain
        for chain in found
        for cell in chain
    }
    assert len(results) == len(found) and sum(map(len, found)) == len(planned)
    for chain in found:
        assert chain == sorted(chain, key=planned.index)
    are_short = [chain[0].method == "flap" for chain in found]
    assert are_short == sorted(are_short)


def test_overlap_is_refused(inputs: Path) -> None:
    result = compare(inputs, "--methods", "magnitude", "--sparsity", "0.3", text="text.txt")
    assert result.returncode == 2
    assert "overlap" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_overlap_is_found_at_any_offset(offset: int) -> None:
    draw = torch.Generator().manual_seed(0)
    stream = torch.randint(1000, (16 * 20 + offset,), generator=draw)
    apart = torch.randint(1000, (5, 16), generator=draw)
    evaluated = stream[offset:].view(20, 16)
    check_apart("text", apart, "data", evaluated)
    with pytest.raises(UserError, match="1 of 1"):
        check_apart("text", evaluated[3:4], "data", stream[: 16 * 20].view(20, 16))


def test_rows_by_hand() -> None:
    """Two seeds of loss 2 and 4 over a dense loss of 1: mean 2, sample deviation sqrt 2."""

    def record(method: str, seed: int, nll: float) -> dict[str, object]:
        group = {"method": method, "sparsity": 0.5, "layout": "stock", "recovery": "none"}
        return {
            "cell": {**group, "seed": seed}, "status": "done", "tasks": {},
            "perplexity": {"t": {"value": 2.718**nll, "nll": nll}},
            "num_params": 10, "macs": 20, "seconds": 1.0, "peak_rss": 5,
        }  # fmt: skip

    records = [record("dense", 0, 1.0), record("a", 0, 2.0), record("a", 1, 4.0)]
    failed = ("b", 0.5, "stock", "none")
    rows = {r.method: r for r in report.make_rows(records, {failed: "was killed by signal 9"})}
    excess = rows["a"].figures["excess t"]
    assert excess.value == pytest.approx(2) and excess.spread == pytest.approx(2**0.5)
    assert rows["dense"].figures["excess t"].value == 0
    assert rows["b"].note == "was killed by signal 9" and not rows["b"].figures
    assert "| 50% | b | stock | none | - | - |" in report.markdown(list(rows.values()), "")


def test_ours_beside_the_best_other() -> None:
    """Of the same size; least squares may help the others, a training only where ours had it."""

    def row(method: str, recovery: str, excess: float, sparsity: float = 0.5) -> report.Row:
        figures = {"ppl t": report.Figure(9.0, None), "excess t": report.Figure(excess, None)}
        return report.Row(method, "stock", recovery, sparsity, 1, figures)

    rows = [
        row("dense", "none", 0.0, 0.0), row("ours", "none", 0.2), row("ours", "lora", 0.1),
        row("ours-no-mu", "none", 0.01), row("flap", "none", 0.6), row("flap", "lora", 0.3),
        row("magnitude", "least-squares", 0.5), row("magnitude", "none", 0.1, 0.2),
        report.Row("random", "stock", "none", 0.5, 0),
    ]  # fmt: skip
    found = {pair.row.recovery: (pair.other.value, pair.which) for pair in report.beside(rows)}
    assert found == {"none": (0.5, "magnitude, least-squares"), "lora": (0.3, "flap, lora")}
    shown = report.markdown(rows, "protocol")
    assert "| 50% | ours | stock | none | 9.00 | 0.2000 | - |" in shown
    assert "| 50% | stock | none | t | 0.2000 | 0.5000 | magnitude, least-squares | 0.40 |" in shown
    assert "best other" not in report.markdown(rows[:1], "protocol")
    free = report.beside([row("ours", "none", 0.2), row("flap", "none", 0.0)])
    assert [pair.ratio for pair in free] == ["-"]
