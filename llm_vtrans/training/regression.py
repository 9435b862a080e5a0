"""TUNE, first: what layers and head read, in closed form.

Where dimensions of the stream went, a reader misses what they held. Much of it can be told from
those that stayed: the map `M` of what is read that makes least of

    E ||x - M s||^2

is a regression of what the dense network's norms give their readers, `x`, on what those of the
hard-masked network give, `s`. Whatever weight `W` stands behind, `W M` is then the best reader of
`s` (least squares as in SparseGPT, arXiv:2301.00774, equation 1, shared by all that read in one
place). A pass fits all places at once, which changes what later ones see: hence several, each
of them half of the way (a damped Jacobi iteration: the whole way overshoots).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.basis.moments import add_moment, token_rows, tokens_of
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.families.base import Stream, TensorSpec
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.by_layer import KEPT_HIDDEN, PRESENT_LAYERS, Gates
from llm_vtrans.masking.hooks import removed_after
from llm_vtrans.tasks.encoding import Batch

RIDGE = 0.01  # of the mean square of what is read, towards the map that is there
STEP = 0.5  # of the way to each regression's solution
MAX_PASSES = 3


def fit_readers(
    masked: MaskedModel,
    gates: Gates,
    batches: Sequence[Batch],
    measure: Callable[[], float],
) -> float:
    """Replaces the maps of what is read as long as the network gains by it.

    Args:
        masked: the network; its tuning is on and starts from a plan's maps.
        gates: of the plan, in force afterwards.
        batches: inputs to observe it on, the same on every rank.
        measure: what the network as it is loses, in nats.

    Returns:
        What it loses at the end: no more than at the beginning.
    """
    places = _places(masked, gates)
    maps = {name: masked.tuning.maps[name].data for name in places.values()}
    loss = measure()
    for _ in range(MAX_PASSES):
        before = {name: matrix.clone() for name, matrix in maps.items()}
        _refit(masked, gates, batches, places)
        fitted = measure()
        if not fitted < loss:  # nor if it is NaN
            for name, matrix in before.items():
                maps[name].copy_(matrix)
            break
        loss = fitted
    return loss


@torch.no_grad()
def _refit(
    masked: MaskedModel, gates: Gates, batches: Iterable[Batch], places: Mapping[str, str]
) -> None:
    """One regression of all maps of what is read, on one set of observations."""
    kept = gates.get(KEPT_HIDDEN)
    moments: dict[str, list[Tensor]] = {}
    for batch in batches:
        rows = token_rows(batch)
        dense, pruned = (_read(masked, places, g, batch) for g in (None, gates))
        for place, name in places.items():
            x, s = (tokens_of(read[place], rows) for read in (dense, pruned))
            s = s if kept is None else s[:, kept]
            if name not in moments:
                shapes = (s.shape[1], s.shape[1]), (x.shape[1], s.shape[1])
                moments[name] = [s.new_zeros(shape, dtype=torch.float32) for shape in shapes]
            gram, cross = moments[name]
            add_moment(gram, s, s)
            add_moment(cross, x, s)
    for name, (gram, cross) in moments.items():
        matrix = masked.tuning.maps[name]
        columns = torch.arange(len(matrix), device=matrix.device) if kept is None else kept
        start = matrix[:, columns].double()
        fitted = agreed(_regression(gram.double(), cross.double(), start).cpu())
        matrix[:, columns] = matrix[:, columns].lerp(fitted.to(matrix.device), STEP)


def _regression(gram: Tensor, cross: Tensor, start: Tensor) -> Tensor:
    """`M` of least `E ||x - M s||^2 + ridge ||M - start||^2`.

    Args:
        gram: sum of `s s^T`, `(num_kept, num_kept)`.
        cross: sum of `x s^T`, `(hidden_size, num_kept)`.
        start: `(hidden_size, num_kept)`.

    Returns:
        The same shape as `start`, float32.
    """
    ridge = RIDGE * gram.diagonal().mean()
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(damped, (cross + ridge * start).T).T.float()


def _places(masked: MaskedModel, gates: Gates) -> dict[str, str]:
    """Module whose output or, behind post-norms, input is read -> name of the map that it meets.

    Sub-layers that went read nothing; heads that read one token of a sequence, too few to tell.
    """
    architecture, tuning = masked.architecture, masked.tuning
    stream = Stream.READS if architecture.is_post_norm else Stream.SCALES
    present = gates.get(PRESENT_LAYERS)

    def is_gone(spec: TensorSpec, layer: int | None) -> bool:
        if present is None or spec.sublayer is None:
            return False
        return not present[layer, spec.sublayer.order]

    found = {}
    for name, (spec, layer) in architecture.named_tensors().items():
        path, _, leaf = name.rpartition(".")
        has_tokens = spec.positions is None and not is_gone(spec, layer)
        if spec.stream is stream and leaf == "weight" and has_tokens:
            map_name = tuning.map_name(spec, layer)
            if map_name in tuning.maps:
                found[path] = map_name
    return found


def _read(
    masked: MaskedModel, places: Iterable[str], gates: Gates | None, batch: Batch
) -> dict[str, Tensor]:
    """What stands in front of the maps in every place, `(..., hidden_size)`, under some gates."""
    seen: dict[str, Tensor] = {}

    def input_of(place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[place] = args[0]

        return hook

    def output_of(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[place] = masked.layer_norm(module, args[0], output)

        return hook

    hooks: list[Any] = []
    for place in places:  # before those of the masked network, which map what passes
        module = masked.model.get_submodule(place)
        if masked.architecture.is_post_norm:
            hooks.append(module.register_forward_pre_hook(input_of(place), prepend=True))
        else:
            hooks.append(module.register_forward_hook(output_of(place), prepend=True))
    with removed_after(hooks):
        masked.set_gates(gates)
        masked(batch)
    return seen
