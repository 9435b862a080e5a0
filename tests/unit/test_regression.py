"""Maps of what is read, in closed form: least squares, for every kind of family, never a loss."""

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_vtrans.families import Axis
from llm_vtrans.families.base import Place
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.by_layer import KEPT_HIDDEN, presence
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.regression import RIDGE, _regression, fit_readers
from tests.tiny import tiny_model
from tests.unit.test_tuning import architecture_of, fresh, tokens

FAMILIES = ["llama", "qwen3", "gemma", "llama-classify", "gpt2", "bert-mlm", "roberta-classify"]
TIED = ["qwen3", "gemma", "gpt2"]  # the head has the embeddings' map


def pruned(name: str) -> tuple[MaskedModel, dict[str, Tensor]]:
    """A tiny model, hard-masked, without every fourth hidden dimension and its first sub-layer."""
    architecture = architecture_of(name)
    masked = MaskedModel(tiny_model(name), architecture, fresh(name))
    masked.tuning.is_on = True
    keep = torch.ones(architecture.num_units[Axis.HIDDEN], dtype=torch.bool)
    keep[::4] = False
    layers = torch.ones(architecture.num_layers, 2)
    layers[0, 0] = 0
    gates = {
        "hidden": keep.float(),
        KEPT_HIDDEN: keep.nonzero().flatten(),
        "layers": layers,
        **presence({"hidden": keep, "layers": layers}, architecture.num_layers),
    }
    return masked, gates


def padding(tokens: Tensor) -> Tensor:
    """A mask of rows of which every second one ends early."""
    mask = torch.ones_like(tokens)
    mask[::2, 9:] = 0
    return mask


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_regression_is_the_least(seed: int, num_kept: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, s, start, shift = (
        torch.randn(*shape, dtype=torch.float64, generator=draw)
        for shape in ((20, 6), (20, num_kept), (6, num_kept), (6, num_kept))
    )
    gram, cross = s.T @ s, x.T @ s
    ridge = RIDGE * gram.diagonal().mean()

    def cost(matrix: Tensor) -> float:
        return float((x - s @ matrix.T).square().sum() + ridge * (matrix - start).square().sum())

    best = _regression(gram, cross, start).double()
    for step in (-1e-2, 1e-2, 1.0):
        assert cost(best) <= cost(best + step * shift)


@pytest.mark.parametrize("name", FAMILIES)
def test_network_comes_nearer(name: str) -> None:
    """All families have readers to fit; what is written stays as it was."""
    masked, gates = pruned(name)
    distillation = SelfDistillation(masked)
    batches = [{"input_ids": rows, "attention_mask": padding(rows)} for rows in tokens(32).split(8)]
    taught = [(batch, distillation.teach(batch)) for batch in batches]
    before = {name: matrix.clone() for name, matrix in masked.tuning.maps.items()}

    @torch.no_grad()
    def measure() -> float:
        return sum(float(distillation.loss(*pair)) for pair in taught)

    masked.set_gates(gates)
    start = measure()
    end = fit_readers(masked, gates, batches, measure)
    assert end < start
    assert measure() == end
    moved = {n for n, matrix in masked.tuning.maps.items() if not torch.equal(matrix, before[n])}
    assert any(n.startswith(Place.READ.value) for n in moved)
    # The classifier of an encoder reads one token of a sequence: too few to tell its map.
    assert (Place.END in moved) == (name not in ("roberta-classify", *TIED))
    assert all(n.startswith((Place.READ.value, Place.END.value)) for n in moved)


def test_worse_maps_are_taken_back() -> None:
    masked, gates = pruned("llama")
    before = {name: matrix.clone() for name, matrix in masked.tuning.maps.items()}
    losses = count(1)
    assert fit_readers(masked, gates, [{"input_ids": tokens(8)}], lambda: float(next(losses))) == 1
    for name, matrix in masked.tuning.maps.items():
        assert torch.equal(matrix, before[name])


def test_padding_tells_nothing() -> None:
    """Whatever stands behind the end of a text, the maps are the same."""
    ids = tokens(8)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    found = []
    for filler in (0, 1):
        masked, gates = pruned("bert-mlm")
        batch = {"input_ids": torch.where(mask > 0, ids, filler), "attention_mask": mask}
        losses = count(9, -1)
        fit_readers(masked, gates, [batch], lambda losses=losses: float(next(losses)))
        found.append({n: matrix.clone() for n, matrix in masked.tuning.maps.items()})
    for name, matrix in found[0].items():
        torch.testing.assert_close(matrix, found[1][name], rtol=1e-4, atol=1e-5)
