"""Weights that a run trains: which they are, and how export comes to read them.

Export streams from a checkpoint, one tensor at a time. Frozen weights have theirs, the
dense one. Trained ones are written to a temporary checkpoint beside the training state,
in the basis in which they were trained: if the stream was rotated before, so is what is
written, and the export's own change of basis is only that of the trained maps.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.distributed.zero3 import is_partitioned
from llm_vtrans.errors import UserError
from llm_vtrans.export.shard_writer import ShardWriter
from llm_vtrans.families.base import Architecture, Stream
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.loading.quantised import FULL

FOLDER = "weights"  # inside the state folder
BYTES_PER_PARAMETER = 28  # float32: two states of weight and two moments, and the checkpoint


def check_trainable(args: PruneArguments, accelerator: Accelerator) -> None:
    """Whether the weights can be trained in the form and over the ranks that were asked for.

    Raises:
        UserError: they would be quantised, or cut into slices by DeepSpeed.
    """
    if not args.trains_weights:
        return
    if args.load_in != FULL:
        raise UserError(
            f"--load-in {args.load_in} holds frozen weights, --variant {args.variant} trains them: "
            "leave one of them out"
        )
    if is_partitioned(accelerator):
        raise UserError(
            f"--variant {args.variant} under ZeRO-3: a dense teacher stands beside trained weights "
            "there; launch without DeepSpeed, or take --variant faster"
        )


def train_weights(model: nn.Module, architecture: Architecture, is_rotated: bool) -> None:
    """Lets the weights of a frozen float32 model require gradients.

    Args:
        model: the library's model.
        architecture: its table, after rotation if there is one.
        is_rotated: norm weights then stay ones: the tuning has factors in their place.
    """
    for name, (spec, _) in architecture.named_tensors().items():
        parameter = model.get_parameter(name)
        assert parameter.dtype is torch.float32, name
        parameter.requires_grad_(not (is_rotated and spec.stream is Stream.SCALES))


@contextmanager
def stored_weights(
    model: nn.Module, architecture: Architecture, source: Checkpoint, folder: Path, shard_size: int
) -> Iterator[Checkpoint]:
    """The model's weights as a checkpoint on disk, removed on leaving.

    Args:
        model: the trained model.
        architecture: its table.
        source: the dense checkpoint, of which config and tokenizer are.
        folder: the run's state folder.
        shard_size: largest shard, in bytes.

    Yields:
        A view with the trained tensors and the source's folder and config.
    """
    folder = folder / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
    folder.mkdir(parents=True)
    try:
        names = list(architecture.named_tensors())
        weights = {name: model.get_parameter(name) for name in names}
        specs = {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}
        writer = ShardWriter(folder, specs, shard_size)
        for name, weight in weights.items():
            writer.write(name, weight.detach().contiguous())
        writer.close()
        shutil.copyfile(source.folder / "config.json", folder / "config.json")
        yield replace(Checkpoint.open(folder), folder=source.folder, config=source.config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
