"""RECOVER by least squares: every matrix that writes to the stream is solved for anew.

For each such matrix in the order of execution (METHOD, section 7), with dense inputs `X` and
weights `W` and the inputs `Xp` that it has in the pruned network, solve

    min_W'  ||Y - W' Xp||^2 + ridge * ||W' - Wp||^2,    Y = P W X

where `Wp` is the exported weight and `P` maps the dense stream to the pruned one: rotated
where export rotated, restricted to the kept dimensions and scaled as export scales them.
`Xp` comes from the network whose earlier matrices are solved already. The second moments
are float64; the ridge is the one of least error on windows that did not enter them, and
where none beats `Wp`, the weight stays.

What a network writes in one place says little about its answers where all of it was trained for
them together: there the solutions undo more than they bring. So they are taken if the answers on
those windows come nearer to the dense network's; else the exported weights stay.

Both networks run one layer at a time: what is held beside their weights is the residual
stream of all windows and what one dense layer writes to it, the moments of one matrix, and on the
CPU what was exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.families.base import Axis, Stream, TensorSpec
from llm_vtrans.masking.hooks import removed_after
from llm_vtrans.recovery.training import Lesson, RecoveryRun
from llm_vtrans.tasks.encoding import Examples

IS_FLOAT32, IS_GENERAL, RUNS_SLICED = True, False, False
NUM_WINDOWS = 128  # whose streams are held; a few hundred suffice (METHOD, section 7)
MAX_BATCH_SIZE = 8  # windows in a forward pass
HELDOUT_SHARE = 8  # one batch in so many chooses the ridge
RIDGES = tuple(10.0**power for power in range(-6, 3))  # of the mean diagonal of Xp Xp^T


@dataclass
class Moments:
    """Sums over tokens that a least-squares problem consists of, float64.

    Attributes:
        inputs: `Xp Xp^T`, `(in, in)`.
        cross: `Y Xp^T`, `(out, in)`.
        targets: `||Y||^2`, `()`.
    """

    inputs: Tensor
    cross: Tensor
    targets: Tensor

    @classmethod
    def empty(cls, num_inputs: int, num_outputs: int, device: torch.device) -> Moments:
        """No token seen."""
        new = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(new(num_inputs, num_inputs), new(num_outputs, num_inputs), new(()))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds tokens: inputs `(tokens, in)`, targets `(tokens, out)`."""
        x, y = inputs.double(), targets.double()
        self.inputs += x.T @ x
        self.cross += y.T @ x
        self.targets += y.square().sum()

    def error(self, weight: Tensor) -> float:
        """`||Y - W Xp||^2` for a weight `(out, in)`."""
        quadratic = ((weight @ self.inputs) * weight).sum()
        return float(self.targets - 2 * (self.cross * weight).sum() + quadratic)


def solve(train: Moments, heldout: Moments, exported: Tensor) -> Tensor:
    """The weight of least held-out error among the exported one and the ridge solutions.

    Args:
        train: moments that are solved.
        heldout: moments of other tokens, which choose the ridge.
        exported: `Wp` `(out, in)`, float64, that the ridge pulls towards.

    Returns:
        `(out, in)` float64: `(Y Xp^T + ridge Wp) (Xp Xp^T + ridge I)^-1`.
    """
    values, vectors = torch.linalg.eigh(train.inputs)  # one factorisation for all ridges
    values = values.clamp(min=0)
    scale = float(values.mean())
    residual = (train.cross - exported @ train.inputs) @ vectors
    best, least = exported, heldout.error(exported)
    for ridge in RIDGES:
        if scale * ridge == 0:
            continue
        candidate = exported + (residual / (values + scale * ridge)) @ vectors.T
        error = heldout.error(candidate)
        if error < least:
            best, least = candidate, error
    return best


@dataclass(frozen=True)
class _Writer:
    """A matrix that writes to the stream, in both networks.

    Attributes:
        dense: its module in the dense network.
        pruned: its module in the pruned one.
        spec: its row of the table.
    """

    dense: nn.Module
    pruned: nn.Module
    spec: TensorSpec

    @property
    def _is_transposed(self) -> bool:
        return self.spec.dim_of(Axis.HIDDEN) == 1

    def exported(self) -> Tensor:
        """Weight and, if there is one, bias as last column, float64 `(out, in)`."""
        weight: Any = self.pruned.weight
        weight = (weight.T if self._is_transposed else weight).detach().double()
        bias: Any = getattr(self.pruned, "bias", None)
        return weight if bias is None else torch.cat([weight, bias.detach().double()[:, None]], 1)

    def inputs(self, x: Tensor) -> Tensor:
        """Input tokens `(tokens, in)` with a last column of ones for the bias."""
        x = x.flatten(0, -2)
        has_bias = getattr(self.pruned, "bias", None) is not None
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if has_bias else x

    def write(self, solution: Tensor) -> None:
        """Puts a solution `(out, in)` into the module."""
        bias: Any = getattr(self.pruned, "bias", None)
        if bias is not None:
            bias.copy_(solution[:, -1])
            solution = solution[:, :-1]
        weight: Any = self.pruned.weight
        weight.copy_(solution.T if self._is_transposed else solution)


def check() -> None:
    """Nothing is needed that is not there."""


@torch.no_grad()
def recover(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    pruning: Pruning,
    examples: Examples,
    run: RecoveryRun,
) -> PreTrainedModel:
    """Solves every matrix that writes to the stream inside the layers, first to last.

    The first `NUM_WINDOWS` calibration windows serve, some to choose the ridges and whether the
    solutions are taken; nothing is trained. As `llm_vtrans.recovery.methods.Recover`.
    """
    windows = examples.tensors["input_ids"][:NUM_WINDOWS]
    dense.eval()
    pruned.eval()
    device = next(pruned.parameters()).device
    if len(windows) < HELDOUT_SHARE:
        raise UserError(
            f"least squares needs at least {HELDOUT_SHARE} calibration windows, got {len(windows)}"
        )
    batch_size = min(MAX_BATCH_SIZE, len(windows) // HELDOUT_SHARE)
    batches = list(windows.to(device).split(batch_size))
    heldout = [batch for number, batch in enumerate(batches) if _is_heldout(number)]
    exported = [
        (writer.pruned, {n: p.to("cpu", copy=True) for n, p in writer.pruned.named_parameters()})
        for layer in pruning.plan.shape.kept_layers
        for writer in _writers(dense, pruned, pruning, layer)
    ]
    before = _divergence(dense, pruned, heldout)
    _solve_layers(dense, pruned, pruning, batches)
    after = _divergence(dense, pruned, heldout)
    is_nearer = after < before  # not if it is NaN
    if not is_nearer:
        for module, weights in exported:
            module.load_state_dict(weights)
    run.say(
        f"least squares: {before:.4f} -> {after:.4f} nats from the dense model on "
        f"{sum(map(len, heldout))} held-out windows: {'taken' if is_nearer else 'not taken'}"
    )
    return pruned


def _is_heldout(number: int) -> bool:
    """Whether a batch is one of those that choose."""
    return number % HELDOUT_SHARE == HELDOUT_SHARE - 1


def _divergence(dense: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> float:
    """Mean KL of the answers in nats."""
    lesson = Lesson(dense, pruned, torch.float32)
    losses = [float(lesson({"input_ids": batch})) for batch in batches]
    return sum(losses) / len(losses)


def _solve_layers(
    dense: PreTrainedModel, pruned: PreTrainedModel, pruning: Pruning, batches: list[Tensor]
) -> None:
    """Solves the matrices in the order of execution, each behind those that are solved."""
    device, path = batches[0].device, _layers_path(pruning)
    dense_layers, dense_stream = _enter(dense, path, batches)
    pruned_layers, pruned_stream = _enter(pruned, path, batches)
    positions = {layer: i for i, layer in enumerate(pruning.plan.shape.kept_layers)}
    for index in range(len(dense_layers)):
        writers = list(_writers(dense, pruned, pruning, index))
        maps = [stream_map(pruning, writer.spec, index, device) for writer in writers]
        targets: list[list[Tensor]] = []
        for number, stream in enumerate(dense_stream):
            with ExitStack() as stack:
                seen = [stack.enter_context(_observed(writer.dense)) for writer in writers]
                dense_stream[number] = dense_layers.run(index, stream)
            written = zip(maps, seen, strict=True)
            targets.append([to_kept(calls[0][1]).flatten(0, -2) for to_kept, calls in written])
        if index not in positions:
            continue
        layer = positions[index]
        for place, writer in enumerate(writers):
            _solve_writer(
                writer,
                [batch[place] for batch in targets],
                [partial(pruned_layers.run, layer, stream) for stream in pruned_stream],
            )
        pruned_stream = [pruned_layers.run(layer, stream) for stream in pruned_stream]


def stream_map(
    pruning: Pruning, spec: TensorSpec, layer: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Maps what a dense matrix writes `(..., d)` to what the exported one should `(..., d')`."""
    kept = pruning.kept(Axis.HIDDEN, None)
    gate = pruning.plan.gate[Axis.HIDDEN]
    factor = (gate[kept] * (len(kept) / len(gate)) ** 0.5).to(device)
    columns = None if pruning.basis is None else pruning.basis.at(spec, layer)
    if columns is None:
        return lambda y: y[..., kept.to(device)] * factor
    columns = columns[:, kept].to(device) * factor
    return lambda y: y.float() @ columns


def _solve_writer(writer: _Writer, targets: list[Tensor], runs: list[Callable[[], object]]) -> None:
    """Collects the moments of one matrix over all batches and replaces its weight.

    Args:
        writer: the matrix.
        targets: what it should write, `(tokens, d')` for each batch.
        runs: pass each batch through the pruned layer.
    """
    exported = writer.exported()
    num_outputs, num_inputs = exported.shape
    train, heldout = (Moments.empty(num_inputs, num_outputs, exported.device) for _ in range(2))
    for number, (target, run) in enumerate(zip(targets, runs, strict=True)):
        with _observed(writer.pruned) as seen:
            run()
        moments = heldout if _is_heldout(number) else train
        moments.add(writer.inputs(seen[0][0]), target)
    writer.write(solve(train, heldout, exported))


@contextmanager
def _observed(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of a module in the passes that run meanwhile."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with removed_after([handle]):
        yield seen


def _writers(
    dense: nn.Module, pruned: nn.Module, pruning: Pruning, layer: int
) -> Iterator[_Writer]:
    """Matrices of one dense layer that write to the stream and were not removed."""
    for written, (name, spec, index) in pruning.tensors().items():
        if index == layer and spec.stream is Stream.WRITES and len(spec.dims) == 2:
            yield _Writer(
                dense.get_submodule(name.removesuffix(".weight")),
                pruned.get_submodule(written.removesuffix(".weight")),
                spec,
            )


def _layers_path(pruning: Pruning) -> str:
    """Path of the list of layers, read off the tensors' names."""
    name = next(spec.name for spec in pruning.architecture.tensors if spec.sublayer)
    return name.partition(".{}.")[0]


@dataclass(frozen=True)
class _Layers:
    """A network's layers, each runnable by itself.

    Attributes:
        layers: the library's modules.
        arguments: of each layer for a batch, by the number of windows in it: all but the stream.
    """

    layers: list[nn.Module]
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]

    def __len__(self) -> int:
        return len(self.layers)

    def run(self, index: int, stream: Tensor) -> Tensor:
        """Passes a stream `(batch, seq, d)` through one layer."""
        args, kwargs = self.arguments[len(stream)][index]
        output = self.layers[index](stream, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _enter(model: nn.Module, path: str, batches: list[Tensor]) -> tuple[_Layers, list[Tensor]]:
    """The layers with their other arguments, and the stream in front of the first for each batch.

    Positions and masks depend on a batch's size alone, so one whole pass per size records them.
    """
    layers = list(model.get_submodule(path).children())
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    streams: list[Tensor] = []
    for batch in batches:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        is_known = len(batch) in arguments

        def observe(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            calls: list[Any] = calls,
            is_known: bool = is_known,
        ) -> None:
            calls.append((args, kwargs))
            if is_known:
                raise _FirstLayerReached

        with ExitStack() as stack:
            for layer in layers:
                handle = layer.register_forward_pre_hook(observe, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(suppress(_FirstLayerReached))
            model(input_ids=batch, use_cache=False)
        (stream, *_), _ = calls[0]
        streams.append(stream)
        arguments.setdefault(len(batch), [(args[1:], kwargs) for args, kwargs in calls])
    return _Layers(layers, arguments), streams


class _FirstLayerReached(Exception):  # a signal, not an error
    """Ends a pass of which only the first layer's input was wanted."""
