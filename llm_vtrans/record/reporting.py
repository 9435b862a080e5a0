"""What a run tells: lines on rank zero, metrics.jsonl, seconds and peak memory per phase."""

from __future__ import annotations

import ctypes
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llm_vtrans import __version__
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.training.loop import Progress

CLEAR_LINE = "\r\x1b[2K"
METRICS_FILE = "metrics.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "lm_eval")


@dataclass
class Phase:
    """Cost of one phase: wall-clock seconds, peak resident and device memory in bytes."""

    seconds: float
    peak_rss: int
    peak_device: int

    def __add__(self, other: Phase) -> Phase:
        """Both parts of a phase that was done in two."""
        return Phase(
            self.seconds + other.seconds,
            max(self.peak_rss, other.peak_rss),
            max(self.peak_device, other.peak_device),
        )


@dataclass
class Reporter:
    """Prints on rank zero and keeps the run's record.

    Attributes:
        is_main: whether this is rank zero; other ranks stay silent.
        is_quiet: whether rank zero prints nothing either; metrics are written all the same.
        num_steps: of training, for the progress line.
        phases: seconds and peak memory by name, in order; those before an interruption count.
    """

    is_main: bool
    is_quiet: bool = False
    num_steps: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    _has_live_line: bool = False
    _running: dict[str, float] = field(default_factory=dict)  # since when, by the phase's name

    def say(self, text: str) -> None:
        """One line on standard output."""
        if self.is_main and not self.is_quiet:
            end_of_live_line = "\n" if self._has_live_line else ""
            self._has_live_line = False
            print(f"{end_of_live_line}{text}", flush=True)

    def _say_live(self, text: str, short: str) -> None:
        """On a terminal `short`, which the next one replaces; elsewhere a line of `text`."""
        if not sys.stdout.isatty():
            self.say(text)
        elif not self.is_quiet:
            width = shutil.get_terminal_size().columns
            print(f"{CLEAR_LINE}{short[: width - 1]}", end="", flush=True)
            self._has_live_line = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a phase; the peak counters start anew where the system allows it."""
        self._measure()  # those that this one is a part of
        _reset_peaks()
        self._running[name] = time.perf_counter()
        yield
        self._measure()
        del self._running[name]

    def _measure(self) -> None:
        """Adds to the phases that run what they took since this was called last."""
        if not self._running:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        now, resident = time.perf_counter(), peak_rss()
        for name, start in self._running.items():
            self._add(name, Phase(now - start, resident, device))
            self._running[name] = now

    def _add(self, name: str, part: Phase) -> None:
        self.phases[name] = self.phases[name] + part if name in self.phases else part

    def take_up(self, earlier: Mapping[str, Phase]) -> None:
        """Counts what the run took before it was interrupted."""
        now, self.phases = self.phases, dict(earlier)
        for name, phase in now.items():
            self._add(name, phase)

    def progress(self, folder: Path, progress: Progress) -> None:
        """Appends a line to metrics.jsonl and prints the same for people."""
        if not self.is_main:
            return
        record = {
            "step": progress.step,
            **progress.metrics,
            "tokens_per_second": progress.tokens_per_second,
        }
        with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        metrics = progress.metrics
        sparsity, target = metrics["sparsity"], metrics["target"]
        step = f"step {progress.step:>5}/{self.num_steps}  loss {metrics['loss']:.4f}"
        rate = f"{progress.tokens_per_second:,.0f} tokens/s  ETA {progress.eta_seconds:.0f} s"
        self._say_live(
            f"{step}  distillation {metrics['distillation']:.4f} nats  "
            f"sparsity {sparsity:.3f} (target {target:.3f})  {rate}",
            f"{step}  sparsity {sparsity:.3f}/{target:.3f}  {rate}",
        )

    def record(self) -> dict[str, Any]:
        """Phases for the manifest or a saved state; those that run, as far as they have come."""
        self._measure()
        return {name: asdict(phase) for name, phase in self.phases.items()}


def truncate_metrics(folder: Path, step: int) -> None:
    """Drops records after `step`, and a last line that a kill cut short."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(kept))


def peak_rss() -> int:
    """Peak resident memory in bytes since the last reset, or of the process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peaks() -> None:
    """Begins anew; memory that was freed but not handed back to the system goes first."""
    with suppress(OSError, AttributeError):  # other systems' libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # else peaks are those of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide a result."""
    found = {"llm_vtrans": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Plain text table; the first row is the header, the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
