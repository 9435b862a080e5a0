"""Texts that a model writes itself stand among the calibration windows."""

import torch
from accelerate import Accelerator

from llm_vtrans.own_words import with_own_words
from llm_vtrans.tasks.encoding import Examples
from tests.tiny import tiny_model

SEQ_LEN = 24


def windows() -> Examples:
    draw = torch.Generator().manual_seed(1)
    return Examples({"input_ids": torch.randint(3, 30, (8, SEQ_LEN), generator=draw)})


def test_a_share_of_the_windows_is_what_the_model_says() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # so sure that drawing is taking the likeliest
    before = torch.random.get_rng_state()
    mixed = with_own_words(windows(), 0.25, model, Accelerator(), seed=0).tensors["input_ids"]
    assert torch.random.get_rng_state().equal(before)

    given = windows().tensors["input_ids"]
    is_own = (mixed != given).any(1)
    assert is_own.sum() == 2
    assert mixed[~is_own].equal(given[~is_own])
    with torch.no_grad():
        said = model(mixed[is_own]).logits.argmax(-1)
    assert said[:, :-1].equal(mixed[is_own][:, 1:])
    assert set(mixed[is_own][:, 0].tolist()) <= set(given.unique().tolist())


def test_the_seed_decides() -> None:
    model = tiny_model("llama")

    def own(seed: int) -> torch.Tensor:
        return with_own_words(windows(), 0.5, model, Accelerator(), seed).tensors["input_ids"]

    assert own(0).equal(own(0))
    assert not own(0).equal(own(1))


def test_none_are_written_for_no_share() -> None:
    assert (
        with_own_words(windows(), 0.0, tiny_model("llama"), Accelerator(), 0)
        .tensors["input_ids"]
        .equal(windows().tensors["input_ids"])
    )
