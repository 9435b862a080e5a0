"""Times networks of a shape on the run's device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState

from llm_vtrans.budget.cost import dense_shape
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.families.base import Architecture, Shape
from llm_vtrans.loading.shaped import random_network, shaped_config
from llm_vtrans.loading.source import Source
from llm_vtrans.timing.latency import Pass
from llm_vtrans.timing.latency_cost import LatencyCost, Times, latency_cost
from llm_vtrans.timing.remembered import remembered

REPEATS = 2  # the faster one counts: what else runs on a machine only slows it


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
        """What a network of this shape takes; rank zero measures for all.

        Args:
            shape: kept units.
            is_uniform: stock layout, else per-layer.
        """
        found = self._measure(shape, is_uniform) if PartialState().is_main_process else 0.0
        return agreed(found)

    def table(self, sizes: list[int]) -> LatencyCost:
        """The table at these hidden sizes, measured once for a device, dtype and model shape."""
        what = [self._config(dense_shape(self.architecture), False), str(self.timed), sizes]
        kept = remembered(
            "latency", what, self.device, self.dtype,
            lambda: asdict(latency_cost(self.architecture, sizes, self._measure)),
        )  # fmt: skip
        times = (Times(t["outside"], tuple(t["bases"]), tuple(t["units"])) for t in kept["times"])
        return LatencyCost(tuple(kept["sizes"]), tuple(times), kept["head_dim"], kept["factor"])

    def _measure(self, shape: Shape, is_uniform: bool = False) -> float:
        config = self._config(shape, is_uniform)
        network = random_network(self.source, config, self.dtype, self.device)
        return 1e6 * min(self.timed.milliseconds(network) for _ in range(REPEATS))

    def _config(self, shape: Shape, is_uniform: bool) -> dict[str, Any]:
        source = self.source
        return shaped_config(source.family, source.config, self.architecture, shape, is_uniform)
