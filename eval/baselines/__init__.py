"""One-shot baselines of structured pruning, each in one short file behind one interface.

A name is a base, and for scores of units one of two suffixes: `+hidden` prunes hidden
dimensions as well as heads and FFN units, `+rotation` does so in the principal directions
of the residual stream.
"""

from eval.baselines import (
    depth,
    flap,
    llm_pruner,
    magnitude,
    random_units,
    truncation,
    wanda,
)
from eval.baselines.interface import Case, Method, Pruned
from eval.baselines.selection import Compensation, Selection
from eval.baselines.slicegpt import SliceGPT

__all__ = ["BASELINES", "Case", "Method", "Pruned"]

_BIASES = Compensation(
    flap.compensate,
    flap.num_biases,
    "scored in memory: its biases have no place in a stock config; they are counted",
)
_SCORES = {
    "random": Selection(random_units.importance),
    "magnitude": Selection(magnitude.importance),
    "wanda-sp": Selection(wanda.importance),
    "flap": Selection(flap.importance, scores=flap.scores, compensation=_BIASES),
    "llm-pruner": Selection(llm_pruner.importance, scores=llm_pruner.scores),
}
BASELINES: dict[str, Method] = {
    **_SCORES,
    **{f"{name}+hidden": selection.with_hidden() for name, selection in _SCORES.items()},
    **{f"{name}+rotation": selection.rotated() for name, selection in _SCORES.items()},
    "shortgpt": Selection(depth.importance, structures=("layers",)),
    "truncation": Selection(truncation.importance, structures=("hidden",), is_rotated=True),
    "slicegpt": SliceGPT(),
}
"""Every baseline by the name that `--methods` takes."""
