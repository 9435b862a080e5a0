"""Hypothesis strategies that damage valid JSON and valid bytes, and how many cases are run."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**4000,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0", "..", "../x.safetensors",
    "/etc/passwd", "model.safetensors", "\ud800", "\x1b[2J\x07", "a\nb", "<script>",
    "A" * 5000, "F32", "BOOL", "F4", [], [[]], [0], [-1], [2**62, 2**62], [10**4000, 10**4000],
    [1] * 500, {}, {"a": 1}, {"": None}, "llama", "gpt2", "custom.py--Evil", "someone/code--m.Evil",
]  # fmt: skip


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values below the root of a JSON tree."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    found = []
    for key, value in items:
        found += [(*prefix, key), *paths(value, (*prefix, key))]
    return found


def _change(tree: Any, path: tuple[Any, ...], action: str, value: Any) -> None:
    """One damage in place; a path that an earlier damage removed is left alone."""
    for key in path[:-1]:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return
    try:
        if action == "replace":
            tree[path[-1]] = deepcopy(value)
        elif action == "delete":
            del tree[path[-1]]
        elif isinstance(tree, dict):  # rename
            tree[str(value)[:300]] = tree.pop(path[-1])
    except (KeyError, IndexError, TypeError):
        return


@st.composite
def damaged_json(draw: st.DrawFn, tree: Any, extra_keys: tuple[str, ...] = ()) -> bytes:
    """The JSON of a tree with one to three values replaced, removed or renamed."""
    tree = deepcopy(tree)
    places = [*paths(tree), *((key,) for key in extra_keys)]
    for _ in range(draw(st.integers(1, 3))):
        action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        _change(tree, draw(st.sampled_from(places)), action, draw(st.sampled_from(NASTY)))
    return json.dumps(tree).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with bits flipped, a piece cut out, doubled or replaced, or the end cut off."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        if not result:
            break
        start = draw(st.integers(0, len(result) - 1))
        stop = min(len(result), start + draw(st.integers(1, 64)))
        match draw(st.sampled_from(["flip", "cut", "double", "replace", "end"])):
            case "flip":
                result[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del result[start:stop]
            case "double":
                result[start:start] = result[start:stop]
            case "replace":
                result[start:stop] = draw(st.binary(min_size=1, max_size=16))
            case "end":
                del result[start:]
    return bytes(result)


def fuzz(num_cases: int, strategy: st.SearchStrategy[Any], case: Callable[[Any], None]) -> None:
    """Runs `case` on so many draws, the same ones every time."""
    run = settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(case))
    run()


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test with few cases by default, and with many where `slow` is asked for."""
    return pytest.mark.parametrize(
        "num_cases", [few, pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
    )
