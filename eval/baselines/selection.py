"""One-shot selections: importances -> scores -> the plan that the budget admits -> export.

All selections share this file: groups, budget, allocation and export are the product's own.
Where a score leaves something open (how many hidden dimensions against how many heads and
FFN units; protected layers or not), the candidate with the lowest loss on held-out
calibration text wins, which makes the baseline as strong as its score allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.baselines.interface import Case, Pruned, round_weights
from eval.baselines.network import Importances, Network, check_rotates
from eval.baselines.ranking import uniform_ranks
from llm_vtrans.allocation.allocate import Allocator, PrunePlan
from llm_vtrans.allocation.shape_choice import ffn_room
from llm_vtrans.budget.problem import Problem, check_reachable
from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.scoring.perplexity import token_perplexity

NUM_HIDDEN_SIZES = 7  # candidates between "hidden dimensions alone" and "none of them"
UNITS = (Axis.HEADS.value, Axis.FFN.value)

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Compensation:
    """A change to the exported model that belongs to a method.

    Attributes:
        apply: (dense network, what was exported, exported model) -> parameters added.
        reserve: the most parameters that it may add.
        note: what it means for the result.
    """

    apply: Callable[[Network, Pruning, PreTrainedModel], int]
    reserve: Callable[[Architecture], int]
    note: str


@dataclass(frozen=True)
class Selection:
    """A method that scores units and removes the lowest.

    Attributes:
        importance: (network, seed) -> importances of any scale.
        structures: what is pruned, of `hidden`, `heads`, `ffn`, `layers`.
        is_rotated: whether the network is rotated into its principal directions first.
        scores: (importances, number of layers) -> candidate scores in (0, 1).
        compensation: done to the exported model, if anything.
    """

    importance: Callable[[Network, int], Importances]
    structures: tuple[str, ...] = UNITS
    is_rotated: bool = False
    scores: Callable[[Importances, int], list[Scores]] = uniform_ranks
    compensation: Compensation | None = None
    is_plain: bool = True

    @property
    def is_uniform(self) -> bool:
        """Whole layers and hidden dimensions leave all layers alike."""
        return not set(self.structures) & set(UNITS)

    def with_hidden(self) -> Selection:
        """The same score with hidden dimensions pruned too."""
        return replace(self, structures=(Axis.HIDDEN.value, *self.structures))

    def rotated(self) -> Selection:
        """The same on the rotated network, where hidden dimensions are principal directions."""
        return replace(self.with_hidden(), is_rotated=True)

    def prune(self, case: Case) -> Pruned:
        """Scores, allocates, exports, compensates."""
        if self.is_rotated:
            check_rotates(case.source)
        network = Network.load(case.source, case.windows, case.device, self.is_rotated)
        reserved = self.compensation.reserve(network.architecture) if self.compensation else 0
        problem = case.problem(network.architecture, reserved)
        check_reachable(problem, frozenset(self.structures))
        plan = self._plan(network, problem, case)
        pruning, model = case.export(network.architecture, plan, network.basis)
        num_params, note = problem.cost.of(plan.shape), ""
        if self.compensation is not None:
            num_params += self.compensation.apply(network, pruning, model)
            round_weights(model, next(iter(pruning.source.tensors.values())).dtype)
            note = self.compensation.note
        return Pruned(model, num_params, pruning, note=note)

    def _plan(self, network: Network, problem: Problem, case: Case) -> PrunePlan:
        """The candidate plan of lowest loss on held-out calibration text."""
        importances = self.importance(network, case.seed)
        chosen = {name: importances[name] for name in self.structures}
        basis = network.head_basis() if problem.is_coupled else None
        if basis is not None:
            problem = replace(problem, head_retention=basis.retained)
        plans = [
            replace(allocator.plan(fixed=fixed), basis=basis)
            for scores in self.scores(chosen, network.architecture.num_layers)
            for allocator in [Allocator(scores, {}, problem)]
            for fixed in self._fixed(problem)
        ]
        if len(plans) == 1:
            return plans[0]
        masked = MaskedModel(network.model, network.architecture)
        losses = [masked_loss(masked, plan, case.heldout.to(case.device)) for plan in plans]
        masked.set_gates(None)
        return plans[losses.index(min(losses))]

    def _fixed(self, problem: Problem) -> Iterator[dict[Axis, int]]:
        if self.is_uniform or Axis.HIDDEN.value not in self.structures:
            yield {}
            return
        for size in hidden_sizes(problem, frozenset(self.structures)):
            yield {Axis.HIDDEN: size}


def hidden_sizes(problem: Problem, pruned: frozenset[str]) -> list[int]:
    """Hidden sizes to try, from the one that meets the budget alone to the largest possible.

    Where the stock config demands that heads divide it, those that a number of heads does.
    """
    num_layers = problem.architecture.num_layers
    hidden = torch.tensor(problem.counts(Axis.HIDDEN, Axis.HIDDEN in pruned))
    ffn = problem.counts(Axis.FFN, Axis.FFN in pruned)

    def fits(heads: int, ffn: int) -> Tensor:
        """Which sizes the budget admits with so many units in every layer."""
        head_dim, possible = problem.head_widths(hidden, heads)
        room, price = ffn_room(problem, hidden, heads, head_dim, num_layers)
        return possible & (price * ffn <= room).all(0)

    heads = problem.counts(Axis.HEADS, Axis.HEADS in pruned)
    possible = hidden[torch.stack([fits(number, ffn[0]) for number in heads]).any(0)]
    if not len(possible):
        check_reachable(problem, pruned)
        target = problem.budget.target
        raise UserError(f"budget of {target:,} parameters is unreachable: lower --sparsity")
    alone = hidden[fits(heads[-1], ffn[-1])]
    between = possible[possible >= alone[-1]] if len(alone) else possible
    steps = torch.linspace(0, len(between) - 1, NUM_HIDDEN_SIZES).round().long()
    return sorted({*between[steps].tolist()})


def masked_loss(masked: MaskedModel, plan: PrunePlan, windows: Tensor) -> float:
    """Nats per token of the hard-masked model, which the export computes too."""
    device = windows.device
    masked.set_gates({name: gate.to(device) for name, gate in plan.hard().items()})
    return token_perplexity(masked.model, windows).nll
