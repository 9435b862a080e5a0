"""SliceGPT: the residual stream is rotated anew in front of every norm, then truncated.

SliceGPT (arXiv:2401.15024, section 3): RMSNorm commutes with an orthogonal matrix (equation
2), so each block may have a basis of its own, the eigenvectors of the second moment of its
norm's outputs (section 3.3); the residual connection then needs `Q_l^T Q_l+1` (section 3.2), and
the least principal directions are deleted (section 3.4). Those matrices, one per block, are
parameters: they count against the budget here. Stock configs cannot express them, so the
model is scored in memory: hooks add them to the truncated stock model.

Moments are those of the dense network, as in the paper's equations; the authors' code takes
them from the already sliced one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eval.baselines.interface import Case, Pruned
from eval.baselines.network import Network, check_rotates, hooked
from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.rotation import Basis, rotated_architecture
from llm_vtrans.budget.cost import complete, dense_shape
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning, export_config
from llm_vtrans.families import Architecture, Axis, Shape
from llm_vtrans.families.base import Stream, Sublayer, TensorSpec
from llm_vtrans.loading.model import load_model

NOTE = "scored in memory: its residual matrices have no place in a stock config; they are counted"


@dataclass(frozen=True)
class SliceGPT:
    """The method; it prunes hidden dimensions alone, and as many in every layer."""

    is_uniform: bool = True
    is_plain: bool = False

    def prune(self, case: Case) -> Pruned:
        """Finds the bases, slices, and adds the residual matrices."""
        check_rotates(case.source)
        architecture = rotated_architecture(case.source.architecture)
        model = load_model(case.source, torch.float32, case.device, architecture)
        network = Network(case.source, model, architecture, case.windows.to(case.device))
        problem = case.problem(architecture)
        size = sliced_size(problem)
        bases = block_bases(network, architecture)
        plan = leading_dimensions(architecture, size)
        pruning = Pruning(case.source.checkpoint, architecture, plan, Basis.rotation(bases[0]))
        sliced = sliced_model(case, pruning, bases).to(case.device)  # type: ignore[arg-type]
        extra = 2 * architecture.num_layers * size**2
        num_params = problem.cost.of(plan.shape) + extra
        return Pruned(sliced, num_params, pruning, added_macs=extra, note=NOTE)


def sliced_size(problem: Problem) -> int:
    """Largest hidden size at which weights and residual matrices fit the budget.

    Raises:
        UserError: not even one dimension fits.
    """
    architecture, dense = problem.architecture, dense_shape(problem.architecture)
    for size in range(architecture.num_units[Axis.HIDDEN], 0, -1):
        shape = Shape(size, dense.heads, dense.ffn)
        if problem.cost.of(shape) + 2 * architecture.num_layers * size**2 <= problem.budget.target:
            return size
    raise UserError(f"budget of {problem.budget.target:,} parameters is unreachable for SliceGPT")


def leading_dimensions(architecture: Architecture, size: int) -> PrunePlan:
    """Keeps the first `size` hidden dimensions and everything else."""
    whole = complete({"layers": torch.ones(1, 1)}, architecture)
    keep = {name: values.bool() for name, values in whole.items() if name != "layers"}
    keep[Axis.HIDDEN.value] = torch.arange(architecture.num_units[Axis.HIDDEN]) < size
    return PrunePlan(keep, whole)


@torch.no_grad()
def block_bases(network: Network, architecture: Architecture) -> list[Tensor]:
    """Principal directions of every norm's output before its weight, in the order of execution.

    Returns:
        `2 * num_layers + 1` orthogonal `(d, d)` float32, strongest direction first.
    """
    size = architecture.num_units[Axis.HIDDEN]
    norms = norm_names(architecture)
    moments = {name: torch.zeros(size, size, dtype=torch.float64) for name in norms}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)
            moments[name] += (x.T @ x).double().cpu()

        return hook

    with hooked(network.model, {name: observe(name) for name in norms}):
        for batch in network.batches:
            network.forward(batch)
    return [torch.linalg.eigh(moments[name]).eigenvectors.flip(1).float() for name in norms]


def norm_names(architecture: Architecture) -> list[str]:
    """Norm weights in front of each block and of the head: attention 0, FFN 0, attention 1, ..."""
    norms = {
        part: next(s.name for s in architecture.tensors if scales(s) and s.sublayer is part)
        for part in Sublayer
    }
    blocks = [norms[p].format(i) for i in range(architecture.num_layers) for p in Sublayer]
    return [*blocks, architecture.final_norm]


def scales(spec: TensorSpec) -> bool:
    """Whether the tensor is the weight of a norm of the residual stream."""
    return spec.stream is Stream.SCALES


def basis_index(spec: TensorSpec, layer: int | None, num_layers: int) -> int:
    """Which basis a tensor lives in: readers in their block's, writers in the next block's."""
    if layer is None:
        return 0 if spec.stream is Stream.WRITES else 2 * num_layers
    return spec.depth(layer) + (spec.stream is Stream.WRITES)


@torch.no_grad()
def sliced_model(case: Case, pruning: Pruning, bases: list[Tensor]) -> PreTrainedModel:
    """The truncated stock model, each tensor in its own basis, with residual matrices hooked in."""
    architecture = pruning.architecture
    config = export_config(pruning, case.source.family, case.source.config, True)
    model = empty_model(config)
    for written, (name, spec, layer) in pruning.tensors().items():
        index = basis_index(spec, layer, architecture.num_layers)
        tensor = replace(pruning, basis=Basis.rotation(bases[index])).pruned(name, spec, layer)
        model.get_parameter(written).copy_(tensor)
    size = pruning.plan.shape.hidden
    norms = norm_names(architecture)
    for written, (_, spec, layer) in pruning.tensors().items():
        if spec.stream is Stream.WRITES and layer is not None and len(spec.dims) == 2:
            index = spec.depth(layer)
            residual = (bases[index].T @ bases[index + 1])[:size, :size]
            add_residual(model, norms[index], written, residual.to(case.device))
    return model.eval()


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """A stock model of this config in float32."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    parsed = AutoConfig.for_model(str(config["model_type"]), **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    return model.requires_grad_(False)


def add_residual(model: nn.Module, norm: str, writer: str, residual: Tensor) -> None:
    """Turns a block's `x + f(x)` into `x R + f(x)` by adding `x (R - 1)` to what it writes.

    Args:
        model: changed in place.
        norm: name of the weight of the block's norm, whose input is `x (..., d)`.
        writer: name of the weight that writes `f(x)`.
        residual: `R (d, d)`, applied from the right.
    """
    difference = residual - torch.eye(len(residual), device=residual.device)
    stream: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream[:] = [args[0]]

    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + stream.pop() @ difference.to(output.dtype)

    model.get_submodule(norm.removesuffix(".weight")).register_forward_pre_hook(remember)
    model.get_submodule(writer.removesuffix(".weight")).register_forward_hook(add)
