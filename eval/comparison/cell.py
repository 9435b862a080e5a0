"""One cell of the comparison: prune, recover, score, and one JSON file that says so.

A cell is decided by its key alone; its file bears a hash of it. Files are written whole or
not at all, so whatever is there is true, and a rerun computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from eval.baselines import BASELINES, Case, Method, Pruned
from eval.baselines.interface import Cost, round_weights
from eval.comparison.ours import Ours
from llm_vtrans.budget.cost import dense_shape, mac_cost, parameter_cost
from llm_vtrans.errors import UserError
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import Source, load_tokenizer, open_source
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.record.reporting import peak_rss, versions
from llm_vtrans.recovery.methods import recovery_for
from llm_vtrans.recovery.training import RecoveryRun
from llm_vtrans.scoring.perplexity import token_perplexity
from llm_vtrans.tasks.encoding import Examples

DENSE, OURS, NO_RECOVERY = "dense", "ours", "none"
SCRATCH_PREFIX = ".scratch-"
SELECTION_WINDOWS = 128  # of the calibration windows, that one-shot methods see
CHOICE_WINDOWS = 32  # the next ones, on which they choose among candidates


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison share.

    Attributes:
        model: dense checkpoint as the user named it.
        data: calibration text as the user named it.
        samples: calibration windows.
        seq_len: tokens in one.
        context_length: tokens in a window of the evaluation texts.
        texts: names of the evaluation texts.
        tasks: zero-shot tasks.
        data_dir: folder of the named texts and of the tasks' data.
        limit: windows per text and documents per task, or None for all.
        output: folder of the report.
    """

    model: str
    data: str
    samples: int
    seq_len: int
    context_length: int
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    data_dir: str
    limit: int | None
    output: str

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that change a result."""
        places = ("output", "data_dir")
        return {name: value for name, value in asdict(self).items() if name not in places}


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        method: `dense`, `ours` or a name of `BASELINES`.
        sparsity: share of all parameters removed.
        layout: `stock` or `per-layer`.
        recovery: `none` or a name that `llm_vtrans.recovery.methods` knows.
        seed: of calibration windows, random draws and training.
        checkpoint: hash of the dense weights.
        inputs: hash of the calibration and evaluation tokens.
    """

    method: str
    sparsity: float
    layout: str
    recovery: str
    seed: int
    checkpoint: str
    inputs: str

    def key(self, settings: Settings) -> dict[str, Any]:
        """Everything that decides the result."""
        code = {n: v for n, v in versions().items() if n in ("llm_vtrans", "torch", "transformers")}
        windows = {"selection_windows": SELECTION_WINDOWS, "choice_windows": CHOICE_WINDOWS}
        return {**asdict(self), **settings.decisive, **windows, "versions": code}

    def file(self, settings: Settings) -> Path:
        """Where the result lies."""
        key = json.dumps(self.key(settings), sort_keys=True, default=list)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        name = f"{self.method}-{self.sparsity:g}-{self.layout}-{self.recovery}-seed{self.seed}"
        return Path(settings.output) / "cells" / f"{name}-{digest}.json"

    def describe(self) -> str:
        """For people."""
        if self.method == DENSE:
            return "dense"
        recovery = "" if self.recovery == NO_RECOVERY else f", {self.recovery}"
        return f"{self.method} {self.sparsity:g} {self.layout}{recovery}, seed {self.seed}"


def method_of(name: str, settings: Settings) -> Method:
    """The method of this name."""
    if name in BASELINES:
        return BASELINES[name]
    lever = None if name == OURS else name
    return Ours(settings.model, settings.data, settings.samples, settings.seq_len,
                Path(settings.output) / "ours", lever)  # fmt: skip


def windows_file(settings: Settings, inputs: str) -> Path:
    """Where a comparison keeps its tokens: `train` and one tensor per text."""
    return Path(settings.output) / "windows" / f"{inputs}.safetensors"


def run_cell(cell: Cell, settings: Settings) -> None:
    """Computes one cell and writes its file; the whole process is the cell's.

    A budget that the method cannot reach is a result too.
    """
    threading.Thread(target=_end_with_the_comparison, daemon=True).start()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(cell.seed)
    with redirect_stdout(sys.stderr):  # stdout belongs to the table
        try:
            result = {"status": "done", **_measure(cell, settings)}
        except UserError as error:
            result = {"status": "impossible", "note": str(error)}
    record = {"cell": asdict(cell), "key": cell.key(settings), **result}
    file = cell.file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(record, indent=2) + "\n")


def _end_with_the_comparison() -> None:
    """Whoever killed it cannot see its cells; a training saves its state."""
    if (comparison := multiprocessing.parent_process()) is not None:
        comparison.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    source = open_source(settings.model)
    tokens = load_file(windows_file(settings, cell.inputs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    took = Cost(0.0, 0)
    with tempfile.TemporaryDirectory(dir=settings.output, prefix=SCRATCH_PREFIX) as scratch:
        if cell.method == DENSE:
            num_params = parameter_cost(source.architecture).of(dense_shape(source.architecture))
            model, details = load_model(source, torch.float32, device), {}
            macs = mac_cost(source.architecture, settings.context_length).of(
                dense_shape(source.architecture)
            )
        else:
            method = method_of(cell.method, settings)
            is_uniform = cell.layout == "stock"
            sizes = [SELECTION_WINDOWS, CHOICE_WINDOWS]
            windows, heldout = tokens["train"][: sum(sizes)].split(sizes)
            case = Case(
                source,
                windows,
                heldout,
                cell.sparsity,
                is_uniform,
                cell.seed,
                Path(scratch),
                device,
            )
            pruned = method.prune(case)
            model, num_params = pruned.model, pruned.num_params
            if pruned.cost is not None:
                took, start = pruned.cost, time.perf_counter()
            if cell.recovery != NO_RECOVERY:
                model = _recover(cell.recovery, case, pruned, tokens["train"])
            macs, details = _macs(pruned, settings.context_length), _details(pruned)
    seconds = took.seconds + time.perf_counter() - start
    return {
        "num_params": num_params,
        "macs": macs,
        "seconds": seconds,
        "peak_rss": max(took.peak_rss, peak_rss()),
        **details,
        "perplexity": _perplexities(model, tokens, settings),
        "tasks": _tasks(model, source, settings),
    }


def _recover(name: str, case: Case, pruned: Pruned, windows: Tensor) -> PreTrainedModel:
    """Recovers a model in memory, on all calibration windows."""
    dense = load_model(case.source, torch.float32, case.device)
    run = RecoveryRun.alone(windows.shape[1], case.seed)
    examples = Examples({"input_ids": windows})
    model = recovery_for(name).recover(dense, pruned.model, pruned.pruning, examples, run)
    return round_weights(model, next(iter(case.source.checkpoint.tensors.values())).dtype)


def _macs(pruned: Pruned, seq_len: int) -> int:
    cost = mac_cost(pruned.pruning.architecture, seq_len)
    return cost.of(pruned.pruning.plan.shape) + seq_len * pruned.added_macs


def _details(pruned: Pruned) -> dict[str, Any]:
    shape = pruned.pruning.plan.shape
    kept = {"hidden": shape.hidden, "heads": list(shape.heads), "ffn": list(shape.ffn)}
    return {"kept": kept, "note": pruned.note}


def _perplexities(
    model: PreTrainedModel, tokens: Mapping[str, Tensor], settings: Settings
) -> dict[str, Any]:
    return {text: asdict(token_perplexity(model, tokens[text])) for text in settings.texts}


def _tasks(model: PreTrainedModel, source: Source, settings: Settings) -> dict[str, float]:
    """Zero-shot scores `task/metric` -> value."""
    if not settings.tasks:
        return {}
    from llm_vtrans.scoring.harness import DistributedLM, load_tasks, run_tasks

    root = Path(__file__).resolve().parents[2]
    tasks = load_tasks(
        list(settings.tasks), root / "eval" / "tasks", Path(settings.data_dir), settings.limit
    )
    lm = DistributedLM(pretrained=model, tokenizer=load_tokenizer(source), batch_size=8)
    scores = run_tasks(lm, tasks, settings.limit)
    return {f"{score.task}/{score.metric}": score.estimate.value for score in scores}
