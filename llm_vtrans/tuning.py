"""TUNE: what is trained beside the gates, all of which export folds into the weights.

Hidden pruning keeps a subspace of the residual stream. PCA picks the one of largest
variance; the network's output may need another, and what writes to the stream may
project onto it along other directions than it is read. So two matrices that serve the
whole network are trained, one at all writes and one at all reads: SliceGPT's
change of basis (arXiv:2401.15024, section 3), oblique and learned. Beside them
every place where a gate multiplies has a factor of its own, as (IA)^3 has (arXiv:2205.05638).
The weights stay frozen, and nothing is left over at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.attachment import MaskedModel
from llm_vtrans.families.base import Architecture, Axis, Stream
from llm_vtrans.rotation import Basis
from llm_vtrans.training import Objective, TrainingSettings, distillation_loss

MAP_LEARNING_RATE = 0.64  # divided by the width
SCALE_LEARNING_RATE = 0.02
WRITE, READ = "write", "read"
INPUT, OUTPUT = "in", "out"


def scale_name(module: str, side: str) -> str:
    """Key of the factors at one side of a module; parameter names may not contain dots."""
    return f"{module}:{side}".replace(".", "/")


class Tuning(nn.Module):
    """Maps of the residual stream and factors at every gate, float32, at first the identity.

    With a kept set `K` of hidden dimensions, writers become `(write @ W)[K]` and readers
    `W @ read[:, K]`.

    Args:
        architecture: table of the model.
        has_maps: whether the stream may change its basis (`Family.rotates`).
    """

    def __init__(self, architecture: Architecture, has_maps: bool):
        super().__init__()
        size = architecture.num_units[Axis.HIDDEN]
        maps = {name: nn.Parameter(torch.eye(size)) for name in (WRITE, READ) if has_maps}
        self.maps = nn.ParameterDict(maps)
        self.scales = nn.ParameterDict()
        for name, (spec, _) in architecture.named_tensors().items():
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or spec.stream not in (Stream.WRITES, Stream.SCALES):
                continue
            for dim in spec.dims:
                if dim.axis is not None:
                    side = OUTPUT if dim.axis is Axis.HIDDEN else INPUT
                    self.scales[scale_name(module, side)] = nn.Parameter(torch.ones(dim.size))
        self.is_on = False

    def attach(self, model: nn.Module, architecture: Architecture) -> None:
        """Hooks a model; call it before the gates are attached, which come after the maps."""
        for name, (spec, _) in architecture.named_tensors().items():
            path, _, leaf = name.rpartition(".")
            if leaf != "weight" or spec.stream not in (Stream.WRITES, Stream.SCALES):
                continue
            module = model.get_submodule(path)
            if scale_name(path, INPUT) in self.scales:
                module.register_forward_pre_hook(self._scale_input(scale_name(path, INPUT)))
            hook = self._read if spec.stream is Stream.SCALES else self._write
            module.register_forward_hook(hook(scale_name(path, OUTPUT)))

    def basis(self, rotation: Tensor | None) -> Basis | None:
        """The stream's directions, maps and rotation in one; None if it was not rotated.

        Args:
            rotation: `(hidden_size, hidden_size)`, columns the directions that the maps act on.
        """
        if rotation is None:
            return None
        write, read = (self.maps[name].detach().to(rotation.device) for name in (WRITE, READ))
        return Basis(rotation @ write.T, rotation @ read)

    def factors(self) -> dict[str, Tensor]:
        """The factors by `scale_name`, on the CPU."""
        return {name: scale.detach().cpu() for name, scale in self.scales.items()}

    def _scale_input(self, key: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self.is_on:
                return None
            return (args[0] * self.scales[key].to(args[0].dtype), *args[1:])

        return hook

    def _write(self, key: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if not self.is_on:
                return None
            mapped = self._map(output, WRITE)
            return mapped * self.scales[key].to(mapped.dtype)

        return hook

    def _read(self, key: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if not self.is_on:
                return None
            return self._map(output * self.scales[key].to(output.dtype), READ)

        return hook

    def _map(self, x: Tensor, name: str) -> Tensor:
        if name not in self.maps:
            return x
        return nn.functional.linear(x, self.maps[name].to(x.dtype))


class TuneObjective(Objective):
    """Distillation with the kept units fixed: no noise, only the tuning is trained.

    Args:
        masked: frozen model with hooks of gates and tuning.
        tuning: what is trained.
        hard: gate values of the plan, as `set_gates` takes them.
        sparsity: of the plan, for the record.
        settings: of the loop.
    """

    def __init__(
        self,
        masked: MaskedModel,
        tuning: Tuning,
        hard: Mapping[str, Tensor],
        sparsity: float,
        settings: TrainingSettings,
    ):
        super().__init__()
        self.masked, self.tuning, self.hard = masked, tuning, hard
        self.sparsity = sparsity
        self.stage = range(settings.search_steps, settings.num_steps)

    def forward(self, input_ids: Tensor, micro_batch: int, step: int) -> dict[str, Tensor]:
        """Loss terms, each of shape `()`, for tokens `(batch, seq)`."""
        self.masked.set_gates(None)
        self.tuning.is_on = False
        with torch.no_grad():
            teacher = self.masked(input_ids)
        self.masked.set_gates(self.hard)
        self.tuning.is_on = True
        loss = distillation_loss(self.masked(input_ids), teacher)
        sparsity = loss.new_tensor(self.sparsity)
        return {
            "loss": loss, "distillation": loss, "sparsity": sparsity, "target": sparsity,
        }  # fmt: skip

    def optimizer(self) -> torch.optim.Adam:
        """Adam over maps and factors.

        A step of Adam moves every entry alike, so a map's effect grows with its width: its
        rate is inverse to that (maximal update parametrisation, arXiv:2203.03466, table 3).
        """
        maps, scales = list(self.tuning.maps.parameters()), list(self.tuning.scales.parameters())
        return torch.optim.Adam(
            [
                *({"params": [p], "peak": MAP_LEARNING_RATE / p.shape[1]} for p in maps),
                {"params": scales, "peak": SCALE_LEARNING_RATE},
            ]
        )

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Warms up over 5% of the stage, then decays linearly to zero."""
        rise = min(1.0, (step - self.stage.start + 1) / max(1, 0.05 * len(self.stage)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rise * (1 - self.progress(step))
