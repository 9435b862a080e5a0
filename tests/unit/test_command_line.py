"""What a result says of the command that makes it again."""

import ast
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.preparation.command_line import command_line, parse
from llm_vtrans.preparation.planning import training_settings

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "model": st.text("ab /'\"$", min_size=1),
    "sparsity": st.floats(0.1, 0.9),
    "params": st.just("3.4B"),
    "samples": st.integers(100, 1000),
    "batch_size": st.integers(1, 8),
    "round_to": st.sampled_from(["1", "64", "auto"]),
    "own_words": st.floats(0, 0.9),
    "gradient_checkpointing": st.booleans(),
    "output": st.just("some where"),
}


@given(st.fixed_dictionaries({}, optional=OPTIONS))
def test_the_command_sets_the_same_options(options):
    if "params" in options:
        options.pop("sparsity", None)
    args = PruneArguments(**options)
    program, command, *flags = shlex.split(command_line(args))
    assert (program, command) == ("llm-vtrans", "prune") and parse(flags) == args


def test_defaults_are_left_out():
    assert command_line(parse([])) == "llm-vtrans prune --data embedded --sparsity 0.5"


def test_a_recipe_is_spelt_out(tmp_path, monkeypatch):
    """The command holds without the file, and whoever called the process."""
    monkeypatch.setattr(sys, "argv", ["eval/compare.py", "--methods", "ours"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\nsparsity: 0.5\n")
    args = parse(["--config", str(recipe), "--quiet", "true", "--dry-run", "true"])
    again = parse(shlex.split(command_line(args))[2:])
    call = {"config", "quiet", "dry_run"}
    assert all(getattr(again, f.name) == getattr(args, f.name)
               for f in fields(args) if f.name not in call)  # fmt: skip
    assert again.seed == 3 and not any(getattr(again, name) for name in call)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 1000))
def test_every_run_searches(tune_share, num_steps):
    args = PruneArguments(tune_share=tune_share, samples=num_steps, batch_size=1)
    settings = training_settings(args, num_ranks=1)
    assert settings.search_steps >= 1 and settings.num_steps == num_steps
    assert settings.tune_steps <= tune_share * num_steps


def options() -> Iterator[tuple[str, set[str | None]]]:
    """Every option that a program defines by itself, and what is said of it."""
    for folder in ("llm_vtrans", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and node.args:
                    name, caller = node.args[0], ast.unparse(node.func)
                    is_flag = isinstance(name, ast.Constant) and str(name.value).startswith("--")
                    if is_flag and caller.split(".")[-1] in ("add", "add_argument"):
                        yield f"{path.name} {name.value}", {word.arg for word in node.keywords}


@pytest.mark.parametrize(("option", "words"), list(options()))
def test_every_option_has_a_help_text(option: str, words: set[str | None]) -> None:
    assert "help" in words, option
