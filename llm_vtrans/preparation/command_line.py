"""The command line and the YAML recipe, which set the same options."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from llm_vtrans.arguments import BUDGETS, CALL_FIELDS, PruneArguments
from llm_vtrans.errors import UserError


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(arguments: Sequence[str]) -> PruneArguments:
    """Reads recipe and flags.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: an unknown flag or key, or a bad value.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", *(f"--{name}" for name in BUDGETS)):
        finder.add_argument(name, nargs="?")  # the parser below tells of a missing value
    given = vars(finder.parse_known_args(arguments)[0])
    recipe = given["config"]
    options: Any = PruneArguments  # transformers types this parameter as a NewType
    parser = _Parser(options, prog="llm-vtrans prune", allow_abbrev=False)
    replaced = BUDGETS if any(given[name] for name in BUDGETS) else ()
    flags = [*_recipe_flags(Path(recipe), replaced), *arguments] if recipe else list(arguments)
    parsed, unknown = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    assert isinstance(parsed, PruneArguments)
    return parsed


def _recipe_flags(path: Path, replaced: Sequence[str]) -> list[str]:
    """A recipe's fields but for `replaced` as flags, put before the user's own: those win."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: expected a mapping of option names to values")
    known = {f.name for f in fields(PruneArguments)} - {"config"}
    flags = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: unknown key {key!r}; known are {sorted(known)}")
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict | set) for item in items):
            raise UserError(f"--config {path}: {key}: expected a value or a list of values")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if value is not None and name not in replaced:
            flags += [f"--{name}", str(value)]
    return flags


def recipe(args: PruneArguments) -> str:
    """The options as a YAML recipe for `--config`; what belongs to one call is left out."""
    chosen = {
        f.name: getattr(args, f.name)
        for f in fields(args)
        if f.name not in CALL_FIELDS and getattr(args, f.name) is not None
    }
    return yaml.safe_dump(chosen, sort_keys=False)


def command_line(args: PruneArguments) -> str:
    """What makes a run again, in words of a shell: every option that is not its default."""
    words = ["llm-vtrans", "prune"]
    for f in fields(args):
        value = getattr(args, f.name)
        if value != f.default and (f.name == "output" or f.name not in CALL_FIELDS):
            words += [f"--{f.name.replace('_', '-')}", str(value)]
    return shlex.join(words)
