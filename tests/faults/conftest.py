"""The table of `pytest tests/faults --table`: what was tried, what survived, what was seen."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

import pytest

from llm_vtrans.commands.command import run_command
from llm_vtrans.prune import prune
from tests.faults.guard import watch
from tests.runs import flags, write_inputs


@dataclass
class Row:
    """One family of faults.

    Attributes:
        num_cases: inputs or moments that were tried.
        num_refused: those that ended in one line.
        example: the shortest such line.
    """

    num_cases: int = 0
    num_refused: int = 0
    example: str = ""


@dataclass
class Tally:
    """Counts the cases of every family of faults; a case that is lost fails its test instead."""

    rows: dict[str, Row] = field(default_factory=dict)

    def survived(self, family: str, line: str | None = None, num_cases: int = 1) -> None:
        """Counts cases that ended cleanly, or in the one line that the user saw."""
        row = self.rows.setdefault(family, Row())
        row.num_cases += num_cases
        if line:
            row.num_refused += num_cases
            if not row.example or len(line) < len(row.example):
                row.example = line


TALLY = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true", help="print the table of faults at the end")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[TALLY]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and, in `out`, the result of a short run on them; tests change copies only."""
    folder = write_inputs(tmp_path_factory.mktemp("finished"))
    assert run_command(prune, flags(folder, "--quiet")) == 0
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of the inputs without a result."""
    return copytree(finished, tmp_path / "work", ignore=lambda *_: {"out"})


@pytest.fixture(scope="session", autouse=True)
def _watched() -> Iterator[None]:
    watch()
    yield


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.getoption("--table", default=False):
        return
    lost = len(terminalreporter.stats.get("failed", ()))
    terminalreporter.section("faults")
    write = terminalreporter.write_line
    write(f"{'family':44} {'cases':>7} {'refused':>8} {'clean':>7}  what the user saw")
    for family, row in sorted(config.stash[TALLY].rows.items()):
        clean = row.num_cases - row.num_refused
        write(f"{family:44} {row.num_cases:>7} {row.num_refused:>8} {clean:>7}  {row.example}")
    total = sum(row.num_cases for row in config.stash[TALLY].rows.values())
    write(f"{'all':44} {total:>7} cases survived, {lost} tests lost one")
