"""Secrets stay out of everything that is told or written; names from outside stay text."""

import json
from pathlib import Path

import pytest

from llm_vtrans.commands.command import printable, run_command
from llm_vtrans.prune import prune
from llm_vtrans.record.model_card import model_card
from llm_vtrans.record.redaction import redact
from llm_vtrans.training.run_state import STATE_FOLDER, open_state
from tests.faults.cases import one_line, process, told
from tests.faults.conftest import Tally
from tests.runs import flags

TOKEN = "hf_" + "aB3" * 12


def test_token_is_nowhere(
    work: Path, capsys: pytest.CaptureFixture[str], tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no file of a run whose argument held it, and not on either stream."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = flags(work, "--samples", "4", "--label-field", TOKEN)
    monkeypatch.setattr("sys.argv", ["llm-vtrans", *arguments])
    assert run_command(prune, arguments) == 0
    seen = capsys.readouterr()
    assert TOKEN not in seen.out + seen.err
    files = [path for path in (work / "out").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in told(capsys, prune, [f"--token={TOKEN}"])
    tally.survived("secrets", num_cases=len(files) + 3)


def test_a_saved_state_is_private(tmp_path: Path) -> None:
    open_state(tmp_path / "out", None)
    assert (tmp_path / "out" / STATE_FOLDER).stat().st_mode & 0o077 == 0


def test_redaction() -> None:
    assert redact(f"got {TOKEN}.") == "got hf_***."
    assert redact("https://me:pass@host/x") == "https://***@host/x"
    assert redact("hf_transfer, hf-hub, a://b/c@d") == "hf_transfer, hf-hub, a://b/c@d"


def test_errors_cannot_command_a_terminal() -> None:
    assert printable("a\x1b[2J\nb\ud800") == "a\\x1b[2J b\\ud800"
    assert len(printable("x" * 10**6)) < 3000


def test_names_in_the_card_stay_text(finished: Path) -> None:
    manifest = json.loads((finished / "out" / "vtrans.json").read_text())
    manifest["source"] = {
        **manifest["source"],
        "name": "/x/<img src=x onerror=alert(1)>[a](http:evil)",
        "license": {"license": "`</code><script>x</script>`\n---\ntags: [evil]"},
    }
    card = model_card(manifest, "```\n<script>")
    body = card.split("\n---\n", 1)[1]
    assert "# \\<img" in body and "\\[a\\]" in body
    assert "``</code>" not in body and body.count("```") == 4


def test_offline_forbids_the_network(work: Path, tally: Tally) -> None:
    """With the libraries' own switches off, `--offline` alone must do it."""
    child = process(
        [*flags(work, "--model", "someone/some-model"), "--offline"],
        HF_HUB_OFFLINE="0",
        HF_DATASETS_OFFLINE="0",
    )
    _, errors = child.communicate()
    line = one_line(child.returncode, errors)
    assert "--model someone/some-model" in line and "ffline" in line
    tally.survived("network", line)
