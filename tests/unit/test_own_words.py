"""Texts that a model writes itself stand among the calibration windows."""

import pytest
import torch
from accelerate import Accelerator

from llm_vtrans.calibration import own_words
from llm_vtrans.calibration.own_words import own_windows, with_windows
from llm_vtrans.tasks.encoding import Examples
from tests.tiny import tiny_model

SEQ_LEN = 24


def windows() -> Examples:
    draw = torch.Generator().manual_seed(1)
    return Examples({"input_ids": torch.randint(3, 30, (8, SEQ_LEN), generator=draw)})


def test_they_are_what_the_model_says() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # so sure that drawing is taking the likeliest
    before = torch.random.get_rng_state()
    own = own_windows(model, 5, windows(), Accelerator(), seed=0)
    assert torch.random.get_rng_state().equal(before)
    with torch.no_grad():
        said = model(own).logits.argmax(-1)
    assert own.shape == (5, SEQ_LEN)
    assert said[:, :-1].equal(own[:, 1:])
    assert set(own[:, 0].tolist()) <= set(windows().tensors["input_ids"].unique().tolist())


def test_the_seed_decides() -> None:
    model, given = tiny_model("llama"), windows()
    first, second, other = (own_windows(model, 2, given, Accelerator(), s) for s in (0, 0, 1))
    assert first.equal(second) and not first.equal(other)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma", "gpt2"])
def test_a_cache_of_fixed_size_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, texts = tiny_model(name), windows(), []
    for kind in (None, "static"):
        monkeypatch.setattr(own_words, "cache_of", lambda _, kind=kind: kind)
        texts.append(own_windows(model, 2, given, Accelerator(), seed=0))
    assert texts[0].equal(texts[1])


def test_processors_cache_as_they_go() -> None:
    assert own_words.cache_of(tiny_model("llama")) is None


def test_windows_give_way_from_a_place_on() -> None:
    given, own = windows(), torch.full((3, SEQ_LEN), 99)
    mixed = with_windows(given, own, 4, seed=0).tensors["input_ids"]
    is_own = (mixed == 99).all(1)
    assert is_own.sum() == 3 and not is_own[:4].any()
    assert mixed[~is_own].equal(given.tensors["input_ids"][~is_own])
