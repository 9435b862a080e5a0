"""What a run prints: lines in a log, one live line on a terminal, nothing when it is quiet."""

import json
import sys

import pytest
import torch

from llm_vtrans.record import reporting
from llm_vtrans.record.reporting import CLEAR_LINE, METRICS_FILE, Reporter
from llm_vtrans.training.loop import Progress

METRICS = {"loss": 0.5, "distillation": 0.4, "sparsity": 0.25, "target": 0.5}


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("is_quiet", [False, True])
def test_progress(tmp_path, capsys, monkeypatch, is_terminal, is_quiet):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    reporter = Reporter(True, is_quiet, num_steps=20)
    for step in (1, 2):
        reporter.progress(tmp_path, Progress(step, METRICS, 1234.0, 56.0))
    reporter.say("done")
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2]
    out = capsys.readouterr().out
    if is_quiet:
        assert out == ""
        return
    sparsity = "sparsity 0.250/0.500" if is_terminal else "sparsity 0.250 (target 0.500)"
    for part in ("loss 0.5000", sparsity, "1,234 tokens/s", "ETA 56 s"):
        assert out.count(part) == 2
    assert out.endswith("\ndone\n")
    if is_terminal:
        live, last = out.removesuffix("\n").split("\n")
        assert last == "done" and all(len(part) < 80 for part in live.split(CLEAR_LINE))
    else:
        assert len(out.splitlines()) == 3 and CLEAR_LINE not in out


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = Reporter(False)
    reporter.progress(tmp_path, Progress(1, METRICS, 1.0, 1.0))
    reporter.say("x")
    assert capsys.readouterr().out == "" and not (tmp_path / METRICS_FILE).exists()


def test_a_phase_does_not_count_what_an_earlier_one_gave_back() -> None:
    """Small pieces of memory that are freed stay with the process unless they are handed back."""
    reporter = Reporter(is_main=True)
    kept = []
    with reporter.phase("first"):
        pieces = [torch.ones(25_000) for _ in range(4000)]  # 100 KB each
        kept += pieces[::50]
        del pieces
    with reporter.phase("second"):
        pass
    first, second = (reporter.phases[name].peak_rss for name in ("first", "second"))
    assert first - second > 200e6 and len(kept) == 80


def test_phases_add_up_over_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded within a phase, seconds so far included, counts in the run that goes on."""
    clock, peak = iter([10.0, 15.0, 100.0, 102.0, 200.0, 203.0]), iter([5, 7, 9])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(reporting, "peak_rss", lambda: next(peak))
    stopped = Reporter(is_main=True)
    with pytest.raises(KeyboardInterrupt), stopped.phase("search"):
        saved = {name: reporting.Phase(**phase) for name, phase in stopped.record().items()}
        raise KeyboardInterrupt
    resumed = Reporter(is_main=True)
    with resumed.phase("calibration"):
        pass
    resumed.take_up(saved)
    with resumed.phase("search"):
        pass
    assert resumed.record() == {
        "search": {"seconds": 8.0, "peak_rss": 9, "peak_device": 0},
        "calibration": {"seconds": 2.0, "peak_rss": 7, "peak_device": 0},
    }


def test_a_phase_within_another_counts_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    reporter = Reporter(is_main=True)
    with reporter.phase("recover"), reporter.phase("score"):
        pass
    seconds = {name: phase["seconds"] for name, phase in reporter.record().items()}
    assert seconds == {"recover": 7.0, "score": 2.0}
