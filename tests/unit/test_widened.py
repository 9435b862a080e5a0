"""Half-precision layers in float32: the same function and gradients, and only where it pays."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llm_vtrans.loading import widened
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.loading.widened import WidenedLinear, widen_where_slow
from tests.tiny import save_tiny

CPU = torch.device("cpu")
HALVES = sorted(widened.IS_SUPPORTED, key=str)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_rounds_only_the_result(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_bias: bool
) -> None:
    monkeypatch.setitem(widened.IS_SUPPORTED, dtype, lambda: False)
    layer = nn.Linear(24, 40, bias=has_bias, dtype=dtype).requires_grad_(False)
    wide = nn.Linear(24, 40, bias=has_bias).requires_grad_(False)
    wide.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    widen_where_slow(layer, CPU)
    assert type(layer) is WidenedLinear
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    x_wide = x.detach().float().requires_grad_()
    grad = torch.randn(2, 3, 40, dtype=dtype)
    out, out_wide = layer(x), wide(x_wide)
    out.backward(grad)
    out_wide.backward(grad.float())
    assert torch.equal(out, out_wide.to(dtype))
    assert x.grad is not None and x_wide.grad is not None
    assert torch.equal(x.grad, x_wide.grad.to(dtype))


def test_trained_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of weights are none of a widened layer's business: float32 ones need none of it."""
    monkeypatch.setitem(widened.IS_SUPPORTED, torch.bfloat16, lambda: False)
    kinds = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
    for dtype, is_trained in kinds:
        layer = nn.Linear(3, 4, dtype=dtype).requires_grad_(is_trained)
        widen_where_slow(layer, CPU)
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("is_supported", [True, False])
def test_loading_asks_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_supported: bool
) -> None:
    monkeypatch.setitem(widened.IS_SUPPORTED, torch.bfloat16, lambda: is_supported)
    save_tiny("llama", tmp_path)
    source = open_source(str(tmp_path))

    def kinds(dtype: torch.dtype) -> set[type]:
        modules = load_model(source, dtype, CPU).modules()
        return {type(module) for module in modules if isinstance(module, nn.Linear)}

    assert kinds(torch.bfloat16) == {nn.Linear if is_supported else WidenedLinear}
    assert kinds(torch.float32) == {nn.Linear}
