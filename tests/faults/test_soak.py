"""Ten thousand steps: memory and open files stay flat, the log and the metrics stay bounded."""

import json
import os
import time
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest

from tests.faults.conftest import Tally
from tests.runs import flags, start, write_inputs

NUM_STEPS = 10_000
LOG_EVERY = 100
TUNE_SHARE = 0.4
SEARCH_STEPS = round((1 - TUNE_SHARE) * NUM_STEPS)
WARM_UP = 1_000  # steps of a stage in which allocators and caches reach their size
SLOPE = 64  # KiB of resident memory per 1,000 steps: 2.5 MB in a run of 40,000
LONGEST_LINE = 200  # bytes of the log for each logged step


def last_step(metrics: Path) -> int:
    """Of the lines that are whole."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def slope(points: list[tuple[int, int]]) -> float:
    """Per 1,000 steps: the median over all pairs (Theil-Sen), as a leak grows everywhere.

    Single steps upwards, as when the allocator takes another page or a file is read for the
    first time, do not move it.
    """
    pairs = combinations(points, 2)
    return 1000 * median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_steps(tmp_path: Path, tally: Tally) -> None:
    """Watched from outside and killed in the last hundred steps; saved 200 times on the way."""
    folder = write_inputs(tmp_path, num_paragraphs=4000)
    more = ("--tune-share", str(TUNE_SHARE), "--log-every", str(LOG_EVERY))
    process = start(flags(folder, *more, samples=NUM_STEPS, batch_size=1))
    metrics = folder / "out" / "state" / "metrics.jsonl"
    points: list[tuple[int, int]] = []
    stages = (range(WARM_UP, SEARCH_STEPS), range(SEARCH_STEPS + WARM_UP, NUM_STEPS))
    files: set[int] = set()
    while (step := last_step(metrics)) < NUM_STEPS - LOG_EVERY and process.poll() is None:
        if not points or step > points[-1][0]:
            points.append((step, resident_kib(process.pid)))
            if any(step in stage for stage in stages):
                files.add(len(os.listdir(f"/proc/{process.pid}/fd")))
        time.sleep(0.05)
    process.kill()
    output, errors = process.communicate()
    assert errors == "" and len(points) > 50, errors
    for stage in stages:
        within = [(step, resident) for step, resident in points if step in stage]
        found = slope(within)
        steps = f"steps {stage.start}-{stage.stop}"
        ends = " to ".join(str(resident) for _, resident in (within[0], within[-1]))
        print(f"{steps}: {found:+.1f} KiB of resident memory per 1,000 steps ({ends} KiB)")
        assert found < SLOPE, within
    print(f"open files: {sorted(files)}; log: {len(output)} bytes")
    assert max(files) - min(files) <= 1  # one is open while a state or a record is written
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(LOG_EVERY, steps[-1] + 1, LOG_EVERY))
    assert len(output) < LONGEST_LINE * (len(steps) + 20)
    tally.survived("soak: steps", num_cases=steps[-1])
