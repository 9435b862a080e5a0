"""Gates split by layer are the gates of every place."""

import torch
from torch import Tensor

from llm_vtrans.families.base import Axis, Role
from llm_vtrans.masking.by_layer import (
    KEPT_HIDDEN,
    PRESENT_HIDDEN,
    PRESENT_LAYERS,
    PROJECTORS,
    WRITTEN,
    Alive,
    by_layer,
)

LAYERS, WIDTH, HEADS, UNITS = 3, 6, 4, 5


def drawn() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.rand(WIDTH, generator=draw),
        "heads": torch.rand(LAYERS, HEADS, generator=draw),
        "ffn": torch.rand(LAYERS, UNITS, generator=draw),
        "layers": torch.rand(LAYERS, 2, generator=draw),
        PRESENT_HIDDEN: torch.rand(WIDTH, generator=draw),
        PRESENT_LAYERS: torch.rand(LAYERS, 2, generator=draw),
        PROJECTORS[Role.QUERY]: torch.rand(LAYERS, HEADS, 2, 2, generator=draw),
        KEPT_HIDDEN: torch.tensor([0, 2]),
    }


def test_every_entry_is_where_it_was() -> None:
    gates = drawn()
    split = by_layer(gates, None)
    for layer in range(LAYERS):
        for name in ("heads", "ffn", PROJECTORS[Role.QUERY]):
            assert split[name][layer].equal(gates[name][layer])
        for part in range(2):
            assert split[PRESENT_LAYERS][layer][part].equal(gates[PRESENT_LAYERS][layer, part])
            assert split["layers"][layer][part].equal(gates["layers"][layer, part])
            written = gates["hidden"] * gates["layers"][layer, part]
            assert split[WRITTEN][layer][part].equal(written)
    for name in ("hidden", PRESENT_HIDDEN, KEPT_HIDDEN):
        assert split[name] is gates[name]


def test_structures_that_are_not_gated_stay_away() -> None:
    for missing in ("hidden", "layers"):
        gates = {name: gate for name, gate in drawn().items() if name != missing}
        assert by_layer(gates, None).keys() == gates.keys()


def test_units_that_went_are_left_out() -> None:
    gates = drawn()
    keep = {name: torch.rand(gates[name].shape) < 0.5 for name in ("hidden", "heads", "ffn")}
    split = by_layer(gates, Alive(keep))
    for layer in range(LAYERS):
        for axis, name in ((Axis.HEADS, "heads"), (Axis.FFN, "ffn")):
            assert split[name][layer].equal(gates[name][layer][keep[axis][layer]])
        projector = gates[PROJECTORS[Role.QUERY]][layer][keep["heads"][layer]]
        assert split[PROJECTORS[Role.QUERY]][layer].equal(projector)
        written = (gates["hidden"] * gates["layers"][layer, 1])[keep["hidden"]]
        assert split[WRITTEN][layer][1].equal(written)
    assert split[PRESENT_HIDDEN].equal(gates[PRESENT_HIDDEN][keep["hidden"]])


def test_gradients_reach_the_gates() -> None:
    gates = drawn()
    for name in ("hidden", "ffn", "layers"):
        gates[name].requires_grad_()
    split = by_layer(gates, None)
    total = split["ffn"][1].square().sum() + split[WRITTEN][2][0].square().sum()
    total.backward()
    assert gates["ffn"].grad is not None and gates["hidden"].grad is not None
    assert gates["layers"].grad is not None
    ffn = torch.zeros(LAYERS, UNITS)
    ffn[1] = 2 * gates["ffn"][1].detach()
    torch.testing.assert_close(gates["ffn"].grad, ffn)
    hidden, layer = gates["hidden"].detach(), gates["layers"][2, 0].detach()
    torch.testing.assert_close(gates["hidden"].grad, 2 * hidden * layer**2)
    expected = torch.zeros(LAYERS, 2)
    expected[2, 0] = 2 * layer * hidden.square().sum()
    torch.testing.assert_close(gates["layers"].grad, expected)
