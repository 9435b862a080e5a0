"""Times networks on the run's device, beside one of the dense model's shape.

A machine is not always equally fast, and a budget of time is kept or not by a few hundredths. So
passes alternate with those of a dense network, which take what they took when they were first
timed: a time is a share of that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from llm_vtrans.budget.cost import dense_shape
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.families.base import Architecture, Shape
from llm_vtrans.loading.shaped import random_network, shaped_config
from llm_vtrans.loading.source import Source
from llm_vtrans.timing.latency import Pass
from llm_vtrans.timing.latency_cost import LatencyCost, Times, latency_cost
from llm_vtrans.timing.remembered import remembered

TABLE_NOISE, NOISE = 0.02, 0.004  # shares; the table is corrected by what a network takes


@dataclass(frozen=True)
class Stopwatch:
    """Times networks of one model's family.

    Attributes:
        source: the dense checkpoint; none of its weights are read.
        architecture: its table, after rotation if there is one.
        timed: the pass.
        dtype: of the networks.
        device: they run on.
    """

    source: Source
    architecture: Architecture
    timed: Pass
    dtype: torch.dtype
    device: torch.device

    def nanoseconds(self, shape: Shape, is_uniform: bool) -> float:
        """What a network of this shape takes, beside the dense network; rank zero measures for all.

        Args:
            shape: kept units.
            is_uniform: stock layout, else per-layer.
        """
        found = 0.0
        if PartialState().is_main_process:
            found = self.milliseconds(self._network(shape, is_uniform))
        return 1e6 * agreed(found)

    def milliseconds(self, model: PreTrainedModel) -> float:
        """What a network at hand takes, beside the dense network; for rank zero, after `table`.

        Args:
            model: in evaluation mode, on the device.
        """
        return self._dense_ms * self.timed.relative(model, self._dense(), NOISE)

    def table(self, sizes: list[int]) -> LatencyCost:
        """The table at these hidden sizes, measured once for a device, dtype and model shape."""
        unit = 1e6 * self._dense_ms

        def table() -> dict[str, Any]:
            timed, dense = self.timed, self._dense()
            return asdict(
                latency_cost(
                    self.architecture, sizes,
                    lambda s: unit * timed.relative(self._network(s, False), dense, TABLE_NOISE),
                )
            )  # fmt: skip

        kept = remembered("latency", [*self._what, sizes], self.device, self.dtype, table)
        times = (Times(t["outside"], tuple(t["bases"]), tuple(t["units"])) for t in kept["times"])
        return LatencyCost(tuple(kept["sizes"]), tuple(times), kept["head_dim"], kept["factor"])

    @cached_property
    def _dense_ms(self) -> float:
        """Of a pass of the dense network, timed once, by all ranks; kept as the table is."""
        return remembered(
            "dense", self._what, self.device, self.dtype,
            lambda: self.timed.milliseconds(self._dense(), NOISE),
        )  # fmt: skip

    @property
    def _what(self) -> list[object]:
        """Decides, with device and dtype, what is measured."""
        return [self._config(dense_shape(self.architecture), False), str(self.timed)]

    def _dense(self) -> PreTrainedModel:
        return self._network(dense_shape(self.architecture), False)

    def _network(self, shape: Shape, is_uniform: bool) -> PreTrainedModel:
        config = self._config(shape, is_uniform)
        return random_network(self.source, config, self.dtype, self.device)

    def _config(self, shape: Shape, is_uniform: bool) -> dict[str, Any]:
        source = self.source
        return shaped_config(source.family, source.config, self.architecture, shape, is_uniform)
