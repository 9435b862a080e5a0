import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_vtrans.commands import export
from llm_vtrans.errors import UserError
from llm_vtrans.record.masks_file import read_masks
from llm_vtrans.record.output_folder import OutputFolder, atomic_write_bytes, atomic_write_text
from llm_vtrans.record.verification import Subject
from llm_vtrans.report.record import RunRecord


@pytest.fixture(scope="session")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def earlier_result(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "vtrans.json").write_text("old")
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("exists", [False, True])
def test_success_renames(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    with OutputFolder(target) as partial:
        assert partial.parent == target.parent
        assert partial.name == f".out.partial-{os.getpid()}"
        (partial / "vtrans.json").write_text("new")
        assert not target.exists() or not names(target)
    assert (target / "vtrans.json").read_text() == "new"
    assert names(target.parent) == {"out"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    target = earlier_result(tmp_path / "out")
    with pytest.raises(error), OutputFolder(target, overwrite=True) as partial:
        (partial / "half").write_text("new")
        raise error
    assert (target / "vtrans.json").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_overwrite_replaces(tmp_path: Path) -> None:
    target = earlier_result(tmp_path / "out")
    (target / "stale").mkdir()
    with OutputFolder(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
        assert (target / "vtrans.json").exists()
    assert names(target) == {"new"}
    assert names(tmp_path) == {"out"}


def test_a_link_is_replaced_where_it_leads(tmp_path: Path) -> None:
    real = earlier_result(tmp_path / "disk" / "real")
    (tmp_path / "link").symlink_to(real)
    with OutputFolder(tmp_path / "link", overwrite=True) as partial:
        (partial / "new").touch()
    assert names(real) == {"new"} and (tmp_path / "link").is_symlink()


def test_full_folder_needs_overwrite(tmp_path: Path) -> None:
    target = earlier_result(tmp_path / "out")
    with pytest.raises(UserError, match="out: is not empty; pass --overwrite"):
        OutputFolder(target).check()


def test_overwrite_deletes_only_our_own(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").touch()
    with pytest.raises(UserError, match="no vtrans.json, so it is no earlier result"):
        OutputFolder(target, overwrite=True).check()
    assert names(target) == {"thesis.tex"}


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out: is a file"):
        OutputFolder(tmp_path / "out").check()
    with pytest.raises(UserError, match="deep: cannot be made, .*out is no writable folder"):
        OutputFolder(tmp_path / "out" / "deep").check()


def test_parent_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="no writable folder; choose another --output"):
        OutputFolder(tmp_path / "out").check()


def test_mount_point_is_refused() -> None:
    with pytest.raises(UserError, match="mount point"):
        OutputFolder(Path("/"), overwrite=True).check()


def test_check_writes_nothing(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "deep" / "out").check()
    assert not names(tmp_path)


def test_leftovers_of_dead_processes_go(tmp_path: Path, dead_pid: int) -> None:
    live_pid = os.getppid()
    for name in (
        f".out.partial-{dead_pid}",
        f".out.partial-{os.getpid()}",
        f".out.partial-{live_pid}",
        ".out.partial-mine",
        f".output.partial-{dead_pid}",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    OutputFolder(tmp_path / "out").check()
    assert names(tmp_path) == {
        f".out.partial-{live_pid}",
        ".out.partial-mine",
        f".output.partial-{dead_pid}",
    }


def test_crash_between_the_renames_is_undone(tmp_path: Path, dead_pid: int) -> None:
    earlier_result(tmp_path / f".out.replaced-{dead_pid}")
    with pytest.raises(UserError, match="--overwrite"):
        OutputFolder(tmp_path / "out").check()
    assert (tmp_path / "out" / "vtrans.json").read_text() == "old"


def test_crash_after_the_renames_is_finished(tmp_path: Path, dead_pid: int) -> None:
    earlier_result(tmp_path / "out")
    aside = earlier_result(tmp_path / f".out.replaced-{dead_pid}")
    (aside / "state").mkdir()
    OutputFolder(tmp_path / "out", overwrite=True, keep=("state",)).check()
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"vtrans.json", "state"}


def test_old_folder_returns_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = earlier_result(tmp_path / "out")
    rename = Path.rename

    def fail_for_partial(self: Path, other: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("disk gone")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OSError, match="disk gone"), OutputFolder(target, overwrite=True):
        pass
    assert (target / "vtrans.json").read_text() == "old"


def test_training_state_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "state").mkdir(parents=True)
    (target / "state" / "masks.safetensors").touch()
    atomic_write_text(target / "metrics.jsonl", "{}\n")
    with OutputFolder(target, keep=("state", "metrics.jsonl", "absent")) as partial:
        (partial / "vtrans.json").touch()
    assert names(target) == {"state", "metrics.jsonl", "vtrans.json"}
    assert names(target / "state") == {"masks.safetensors"}


def test_a_result_is_not_lost_to_a_race(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder = OutputFolder(target)
    with pytest.raises(UserError, match="The finished result lies in .*partial"), folder as partial:
        (partial / "new").touch()
        target.mkdir()
        (target / "other").touch()
    assert names(target) == {"other"} and names(folder.partial) == {"new"}


def test_require_space(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "deep" / "out")
    folder.require_space(1)
    with pytest.raises(UserError, match=r"needs 1000000000000\.00 GB, its disk has [\d.]+ GB free"):
        folder.require_space(10**21)


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    atomic_write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(path, b"half")
    assert path.read_bytes() == b"new" and names(tmp_path) == {"file.json"}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_unfinished_is_private(tmp_path: Path) -> None:
    """Neither read nor redirected by others who may write into the folder around it."""
    usual = tmp_path / "usual"
    usual.mkdir()
    with OutputFolder(tmp_path / "out") as partial:
        assert mode_of(partial) & 0o077 == 0
    assert mode_of(tmp_path / "out") == mode_of(usual)

    (tmp_path / f".page.partial-{os.getpid()}").symlink_to(usual / "planted")
    atomic_write_text(tmp_path / "page", "text")
    assert names(usual) == set() and not (tmp_path / "page").is_symlink()
    (usual / "file").touch()
    assert mode_of(tmp_path / "page") == mode_of(usual / "file")


def test_a_file_is_private_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(os.fstat(file).st_mode & 0o777))
    atomic_write_text(tmp_path / "page", "text")
    assert modes[0] == 0o600


def test_a_character_that_utf8_lacks_is_written_escaped(tmp_path: Path) -> None:
    """Half of a pair, as JSON from outside may hold it."""
    atomic_write_text(tmp_path / "page", "a\ud800b")
    assert (tmp_path / "page").read_text() == "a\\ud800b"


@pytest.mark.parametrize(
    "read",
    [RunRecord.read, Subject.open, export.flags_of, lambda folder: read_masks(folder, "")],
    ids=["report", "verify", "export", "masks"],
)
def test_a_folder_of_several_budgets_names_its_results(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError, match="name a folder that prune wrote$"):
        read(tmp_path)
    earlier_result(tmp_path / "0.5")
    earlier_result(tmp_path / "0.2")
    with pytest.raises(UserError, match=r"name one of its results: 0\.2, 0\.5$"):
        read(tmp_path)
