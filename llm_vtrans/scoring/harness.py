"""SCORE through the LM Evaluation Harness: one model, many tasks, all ranks.

Beside the harness's own tasks stand `ppl:` tasks, token-level perplexity of a text
(see `llm_vtrans.scoring.perplexity`), so that one run prints both kinds, each with its protocol.
"""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.api import metrics
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llm_vtrans.errors import UserError
from llm_vtrans.scoring.perplexity import (
    NAMED_TEXTS,
    Estimate,
    jackknife_estimate,
    ratio_estimate,
    window_nlls,
)

DATA_PREFIX = "../shared/data/"  # where the task files of this repository look for their data


@dataclass(frozen=True)
class Score:
    """One row of the result: a metric of a task, with the protocol it was measured by.

    Attributes:
        task: name of the task or group.
        metric: name of the metric, with the harness's filter where there is one.
        estimate: the value and its standard error.
        higher_is_better: `None` where the harness does not say.
        protocol: what was measured and over how much text.
    """

    task: str
    metric: str
    estimate: Estimate
    higher_is_better: bool | None
    protocol: dict[str, str | int]


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that are loaded, data included, and the manager that found them."""

    manager: TaskManager
    tasks: dict[str, Task]
    groups: dict[str, Group]
    selected: list[Task | Group]


class DistributedLM(HFLM):
    """The harness's model, sharing the documents among all ranks of the launch.

    HFLM does so only where a process sees several GPUs, and by the local rank; on CPUs,
    with one visible GPU a process, or on several nodes every rank would score everything.
    """

    @property
    def rank(self) -> int:
        """Index of this process among all."""
        return int(PartialState().process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(PartialState().num_processes)


def load_model(
    checkpoint: str,
    batch_size: int,
    dtype: str = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> DistributedLM:
    """Load a causal language model and its tokenizer on this rank's device.

    Args:
        checkpoint: folder or hub name.
        batch_size: sequences in a forward pass, per rank.
        dtype: `auto` (float32 on CPU, where half precision is slow, else the checkpoint's own),
            `float32` or `bfloat16`.
        max_length: longest sequence the harness gives the model, in tokens.
        trust_remote_code: run modelling code that lies in the checkpoint.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    device = PartialState().device
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        return DistributedLM(
            pretrained=checkpoint,
            backend="causal",
            device=str(device),
            dtype=dtype,
            batch_size=batch_size,
            max_length=max_length,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise UserError(f"cannot load the model {checkpoint}: {_first_line(error)}") from error


def load_tasks(
    names: list[str], tasks_dir: Path, data_dir: Path, limit: int | None = None
) -> HarnessTasks:
    """Find the harness tasks of these names and load their documents.

    Args:
        names: task, group or tag names of the harness or of `tasks_dir`.
        tasks_dir: folder with the task files of this repository.
        data_dir: folder that takes the place of `../shared/data` in them.
        limit: documents to score per task, as in `run_tasks`.

    Raises:
        UserError: a name is unknown, a data file is missing or cannot be had offline, or a
            task has fewer documents than there are ranks.
    """
    manager = _find_tasks(names, tasks_dir)
    for name in names:
        _check_data_files(manager, name, data_dir)
    try:
        selected = [item for name in names for item in _load(manager, name, data_dir)]
        loaded = manager.load(selected)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot load the data of {', '.join(names)}: {_first_line(error)}; without internet "
            "use the tasks named *_local"
        ) from error
    for task_name, task in loaded["tasks"].items():
        num_documents = min(len(task.eval_docs), limit or sys.maxsize)
        if num_documents < PartialState().num_processes:
            raise UserError(
                f"{task_name} scores {num_documents} documents on {PartialState().num_processes} "
                "ranks: every rank needs one, so raise --limit or launch fewer processes"
            )
    return HarnessTasks(manager, loaded["tasks"], loaded["groups"], selected)


def run_tasks(lm: DistributedLM, tasks: HarnessTasks, limit: int | None = None) -> list[Score]:
    """Score a model on harness tasks, the documents shared among the ranks.

    Args:
        lm: the model.
        tasks: what `load_tasks` returned; it can be used for one model after the other.
        limit: documents per task; `None` takes all.

    Returns:
        The scores on rank 0, an empty list on the others.
    """
    with _rank_zero_output():
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.selected),
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=0,  # our own errors, computed from the documents, come without draws
            log_samples=True,
        )
    if results is None:
        return []
    scores = {
        name: _task_scores(lm, name, task, results["samples"][name])
        for name, task in tasks.tasks.items()
    }
    rows = [score for task_scores in scores.values() for score in task_scores]
    for name, group in tasks.groups.items():
        rows += _group_scores(name, group, scores)
    return rows


def run_perplexity(
    lm: DistributedLM, name: str, windows: torch.Tensor, num_documents: int
) -> list[Score]:
    """Score a model's token-level perplexity, the windows shared among the ranks.

    Args:
        lm: the model; its batch size counts windows here.
        name: the task's name, `ppl:...`.
        windows: token ids, `(num_windows, context_length)`, int64.
        num_documents: documents the windows were cut from.

    Returns:
        One score, with the standard error over windows; an empty list on ranks other than 0.
    """
    num_windows, context_length = windows.shape
    share = windows[lm.rank :: lm.world_size]
    own = window_nlls(lm.model, share, int(lm.batch_size)).tolist() if len(share) else []
    positions = range(lm.rank, num_windows, lm.world_size)
    gathered = gather_object(list(zip(positions, own, strict=True)))
    if lm.rank != 0:
        return []
    nlls = np.array([nll for _, nll in sorted(gathered)])
    num_tokens = context_length - 1
    protocol: dict[str, str | int] = {
        "perplexity": "token-level, non-overlapping windows, no special tokens",
        "context_length": context_length,
        "num_windows": num_windows,
        "num_tokens": num_windows * num_tokens,
        "num_documents": num_documents,
    }
    estimate = ratio_estimate(nlls, np.full(num_windows, num_tokens), exponential=True)
    return [Score(name, "perplexity", estimate, False, protocol)]


def _find_tasks(names: list[str], tasks_dir: Path) -> TaskManager:
    """Index the task files, the harness's thousands only where a name asks for them."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(tasks_dir))
    for name in names:
        if name not in manager.task_index:
            candidates = [*manager.all_tasks, *(f"ppl:{text}" for text in NAMED_TEXTS)]
            near = difflib.get_close_matches(name, candidates, n=4)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"unknown task {name!r}: {hint}")
    return manager


def _data_files(manager: TaskManager, name: str, data_dir: Path) -> dict[str, str]:
    """Return the local files of a task by split, under `data_dir`; none for other tasks."""
    config = manager.task_index[name].cfg or {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if not isinstance(files, dict):
        return {}
    return {
        split: str(data_dir / file.removeprefix(DATA_PREFIX))
        for split, file in files.items()
        if isinstance(file, str) and file.startswith(DATA_PREFIX)
    }


def _check_data_files(manager: TaskManager, name: str, data_dir: Path) -> None:
    for file in _data_files(manager, name, data_dir).values():
        if not Path(file).is_file():
            raise UserError(f"task {name} needs the file {file}: set --data-dir to its folder")


def _load(manager: TaskManager, name: str, data_dir: Path) -> list[Task | Group]:
    """Load what a name stands for, its data files moved under `data_dir`."""
    if files := _data_files(manager, name, data_dir):
        kwargs = {**manager.task_index[name].cfg["dataset_kwargs"], "data_files": files}
        # A group is the harness's way to load a task of its index with settings changed.
        spec = {"group": "local", "task": [{"task": name, "dataset_kwargs": kwargs}]}
        return list(manager.load([spec])["tasks"].values())
    loaded = manager.load([name])
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _estimate(aggregate: Callable[..., float], items: list[Any]) -> Estimate:
    """Estimate one metric of the harness from its items, one per document."""
    if aggregate is metrics.mean:
        return ratio_estimate(items, np.ones(len(items)))
    if aggregate is metrics.perplexity:
        return ratio_estimate([-item for item in items], np.ones(len(items)), exponential=True)
    if aggregate is metrics.weighted_perplexity:
        return ratio_estimate(*_losses_and_weights(items), exponential=True)
    if aggregate is metrics.bits_per_byte:
        losses, weights = _losses_and_weights(items)
        return ratio_estimate(losses / math.log(2), weights)
    return jackknife_estimate(aggregate, items)


def _losses_and_weights(items: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Split (log-likelihood, words or bytes) pairs; losses in nats."""
    pairs = np.array(items, dtype=np.float64)
    return -pairs[:, 0], pairs[:, 1]


def _task_scores(
    lm: DistributedLM, name: str, task: Task, samples: list[dict[str, Any]]
) -> list[Score]:
    """Estimate every metric of a task from its scored documents."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])  # the ranks' shares interleave
    protocol = _protocol(lm, task, samples)
    keys = dict.fromkeys((metric, s["filter"]) for s in samples for metric in s["metrics"])
    rows = []
    for metric, filter_name in keys:
        items = [s[metric] for s in samples if s["filter"] == filter_name and metric in s]
        aggregate = task.aggregation().get(metric, metrics.mean)
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        better = task.higher_is_better().get(metric)
        rows.append(Score(name, label, _estimate(aggregate, items), better, protocol))
    return rows


def _protocol(lm: DistributedLM, task: Task, samples: list[dict[str, Any]]) -> dict[str, str | int]:
    """State what a task measured: the kind of perplexity, or of choice, and over how much."""
    documents = {sample["doc_id"]: sample for sample in samples}
    amount = {
        "num_fewshot": task.config.num_fewshot or 0,
        "max_length": int(lm.max_length),  # longer contexts lose their start
        "num_documents": len(documents),
    }
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        texts = [sample["arguments"][0][0] for sample in documents.values()]
        return {
            "perplexity": "word- and byte-level, rolling likelihood of whole documents",
            "max_length": int(lm.max_length),
            "num_tokens": sum(len(lm.tok_encode(text)) for text in texts),
            "num_documents": len(documents),
        }
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"perplexity": "of the target string given its context", **amount}
    return {"output_type": str(task.OUTPUT_TYPE), **amount}


def _group_scores(name: str, group: Group, scores: dict[str, list[Score]]) -> list[Score]:
    """Average a group's tasks as its file says; they err independently of one another."""
    rows = []
    for config in group.aggregate_metric_list or []:
        labels = {
            config.metric if filter_name == "none" else f"{config.metric} ({filter_name})"
            for filter_name in config.filter_list or ["none"]
        }
        for label in sorted(labels):
            leaves = [task.task_name for task in group.get_all_tasks()]
            parts = [s for leaf in leaves for s in scores[leaf] if s.metric == label]
            if parts:
                rows.append(_average(name, label, parts, config.weight_by_size))
    return rows


def _average(name: str, label: str, parts: list[Score], by_size: bool) -> Score:
    """Average scores, weighted by their documents or equally."""
    sizes = np.array([float(part.protocol["num_documents"]) for part in parts])
    weights = (sizes if by_size else np.ones(len(parts))) / (sizes.sum() if by_size else len(parts))
    pairs = list(zip(weights, (part.estimate for part in parts), strict=True))
    value = sum(weight * estimate.value for weight, estimate in pairs)
    deviations = np.concatenate([weight * estimate.deviations for weight, estimate in pairs])
    protocol: dict[str, str | int] = {
        "group_of": f"{len(parts)} tasks, weighted {'by documents' if by_size else 'equally'}",
        "num_documents": int(sizes.sum()),
    }
    estimate = Estimate(float(value), deviations)
    return Score(name, label, estimate, parts[0].higher_is_better, protocol)


@contextmanager
def _rank_zero_output() -> Iterator[None]:
    """Keep progress of rank 0 off stdout, which belongs to the table, and drop the others'."""
    if PartialState().is_main_process:
        with redirect_stdout(sys.stderr):
            yield
    else:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
