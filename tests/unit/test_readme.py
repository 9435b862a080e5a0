"""The front page and the results name commands, options, files and messages that exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + (ROOT / "eval" / "RESULTS.md").read_text(encoding="utf-8")
SOURCES = {p: p.read_text(encoding="utf-8") for p in (ROOT / "llm_vtrans").rglob("*.py")}


def command_lines():
    """Every line of a shell block, and every command in a table or sentence."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`((?:llm-vtrans|python eval/|accelerate launch) ?[^`]+)`", TEXT)
    return [*filter(None, (line.split(" #")[0].strip() for line in blocks.splitlines())), *inline]


def options_of(source):
    return {name.replace("_", "-") for name in re.findall(r'"--([a-z][a-z_-]*)"', source)}


def known_options(words):
    """Options of the program that a command line starts, None for others' programs."""
    prune = {f.name.replace("_", "-") for f in fields(PruneArguments)} | {"offline"}
    script = next((w for w in words if w.endswith(".py")), None)
    if words[0] == "llm-vtrans" and len(words) > 1:
        module = COMMANDS[words[1]][0].split(":")[0].replace(".", "/")
        found = options_of(SOURCES[ROOT / "llm_vtrans" / f"{module}.py"]) | {"offline"}
        return found | prune if words[1] in ("prune", "export") else found
    if script == "eval/score.py":
        return options_of(SOURCES[ROOT / "llm_vtrans" / "score.py"])
    if script == "llm_vtrans/prune.py" or "sbatch" in words:
        return prune
    if script is None:
        return None
    own = options_of((ROOT / script).read_text(encoding="utf-8"))
    return own | prune if script == "eval/compare_variants.py" else own


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_their_options_exist(line):
    words = shlex.split(line.replace("[", " ").replace("]", " ").replace("...", " "))
    known = known_options(words)
    start = next((i for i, w in enumerate(words) if w.endswith((".py", ".sbatch"))), 0)
    given = {w[2:].split("=")[0] for w in words[start:] if w.startswith("--")}
    assert known is None or given <= known


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"\b(?:eval|launch|llm_vtrans|tests|ds_configs)/[\w./-]*\w", TEXT))))  # fmt: skip
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_messages_exist():
    table = README[README.index("| message begins with") :]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) >= 5
    everything = re.sub(r'"\s*f?"', "", "".join(SOURCES.values()))  # joins what is on two lines
    for message in messages:
        for part in filter(None, (p.strip() for p in re.split(r"\.\.\.|\bN\b|\bnan\b", message))):
            assert part in everything, message
