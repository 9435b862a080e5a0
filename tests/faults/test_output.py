"""The output folder under attack: two runs at once, a full disk, a limit on files, lost shards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_vtrans.errors import UserError
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.prune import prune
from llm_vtrans.record.output_folder import exclusive
from tests.faults.cases import one_line, process, snapshot, told
from tests.faults.conftest import Tally
from tests.faults.guard import outcome
from tests.runs import ROOT, flags

QUICK = ("--samples", "4", "--quiet")


def test_second_run_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    with exclusive(work / "out"):
        before = snapshot(work)
        for more in ((), ("--overwrite",), ("--resume",), ("--dry-run",)):
            line = told(capsys, prune, flags(work, *QUICK, *more))
            assert "is writing this folder" in line and str(os.getpid()) in line
            tally.survived("two runs into one folder", line)
        assert snapshot(work) == before
    assert [path.name for path in work.glob(".*")] == []


def test_lock_ends_with_its_holder(work: Path) -> None:
    """A killed run leaves its lock's file, which holds nobody up."""
    code = (
        "import sys; from pathlib import Path\n"
        "from llm_vtrans.record.output_folder import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(work / "out")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=str(holder.pid)), exclusive(work / "out"):
        pass
    holder.kill()
    holder.communicate()
    assert (work / ".out.lock").exists()
    with exclusive(work / "out"):
        pass
    assert not (work / ".out.lock").exists()


def test_file_size_limit(work: Path, tally: Tally) -> None:
    """RLIMIT_FSIZE stands in for any write that the system refuses halfway."""
    child = process(flags(work, *QUICK), "prlimit", "--fsize=4096")
    _, errors = child.communicate()
    line = one_line(child.returncode, errors)
    assert not (work / "out" / "config.json").exists()
    assert list(work.glob(".out.partial-*")) == []
    tally.survived("disk", line)


def on_disk(work: Path, options: str) -> tuple[str, str]:
    """Output and the one line of a run that writes to a file system of its own."""
    disk = work / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "{disk}"'
    inside = ("unshare", "-rm", "sh", "-c")
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("mounting in a namespace of its own is not allowed here")
    script = f'{mount} && "$@"; status=$?; ls -A "{disk}/out" 2>/dev/null; exit $status'
    child = process(flags(work, *QUICK, "--output", str(disk / "out")), *inside, script, "sh")
    output, errors = child.communicate()
    return output, one_line(child.returncode, errors)


@pytest.mark.parametrize(
    "kib", [16, *(pytest.param(kib, marks=pytest.mark.slow) for kib in (48, 96)), 160]
)
def test_full_disk(work: Path, kib: int, tally: Tally) -> None:
    """Too small for the state, the shards or the report."""
    output, line = on_disk(work, f"size={kib}k")
    assert "space" in line or "GB free" in line
    assert "config.json" not in output
    tally.survived("disk", line)


def test_read_only_disk(work: Path, tally: Tally) -> None:
    output, line = on_disk(work, "ro")
    assert output == "" and "is no writable folder" in line
    tally.survived("disk", line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_place(work: Path, capsys: pytest.CaptureFixture[str], tally: Tally) -> None:
    (work / "closed").mkdir(mode=0o500)
    line = told(capsys, prune, flags(work, "--output", str(work / "closed" / "out")))
    assert "no writable folder" in line
    tally.survived("disk", line)


def test_shard_vanishes(work: Path, tally: Tally) -> None:
    checkpoint = Checkpoint.open(work / "model")
    name = sorted(checkpoint.tensors)[0]
    (work / "model" / "model.safetensors").unlink()
    line = outcome(lambda: checkpoint.read(name))
    assert line is not None and "cannot be read" in line
    tally.survived("shard vanishes", line)


def test_name_too_long(work: Path, capsys: pytest.CaptureFixture[str], tally: Tally) -> None:
    line = told(capsys, prune, flags(work, *QUICK, "--output", str(work / ("a" * 250))))
    assert "too long" in line
    tally.survived("disk", line)
