"""FINETUNE: a pretrained checkpoint and a task's data -> the dense model that is then pruned."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.distributed.ranks import join
from llm_vtrans.distributed.zero3 import is_partitioned
from llm_vtrans.errors import UserError, blame
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.families import family_for
from llm_vtrans.preparation.family_of_sizes import runs_of
from llm_vtrans.record.output_folder import OutputFolder
from llm_vtrans.record.recording import result_folder
from llm_vtrans.record.reporting import Reporter
from llm_vtrans.tasks import HEADS, Task, make_task
from llm_vtrans.tasks.encoding import collate

RECORD_FILE = "finetuning.json"
WARMUP = 0.1  # share of the steps
DECIDING = (
    "model", "revision", "data", "eval_data", "task", "text_field", "label_field", "seq_len",
    "seed", "batch_size", "gradient_accumulation", "finetune_epochs", "finetune_learning_rate",
)  # fmt: skip


def finetune_first(args: PruneArguments) -> PruneArguments | None:
    """Makes the dense task model beside the output folder, or finds the one of an earlier run.

    Args:
        args: with `task`, and a checkpoint with or without a head.

    Returns:
        The same options with that model in place of the pretrained one; None after `--dry-run`
        where there is none yet.

    Raises:
        UserError: the model or the data cannot be used.
    """
    if args.task is None:
        raise UserError("--finetune-first needs --task")
    folder = args.output_folder().with_name(f"{args.output_folder().name}-dense")
    record = {name: getattr(args, name) for name in DECIDING}
    if _recorded(folder) != record:
        _finetune(
            args, args.task, OutputFolder(folder, args.overwrite, manifest=RECORD_FILE), record
        )
        if args.dry_run:
            return None
    return replace(args, model=str(folder), revision=None)


def _recorded(folder: Path) -> Any:
    """Settings with which the model in a folder was made; None if it is not whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / RECORD_FILE).read_text())["settings"]
    return None


def _finetune(
    args: PruneArguments, kind: str, output: OutputFolder, record: dict[str, Any]
) -> None:
    """Trains all weights on the task's own loss and writes them; `--dry-run` only checks."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerator = join(gradient_accumulation_steps=args.gradient_accumulation)
    reporter = Reporter(accelerator.is_main_process, args.quiet or args.json)
    if is_partitioned(accelerator):
        raise UserError(
            "--finetune-first under ZeRO-3: finetune without it, then prune the result with --model"
        )
    with accelerator.main_process_first():
        for place in (*map(result_folder, runs_of(args)), output):
            place.check()
    set_seed(args.seed)
    where = {"revision": args.revision, "trust_remote_code": False}
    remedy = "name a checkpoint of safetensors that transformers can load"
    with blame(f"--model {args.model}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(args.model, **where)
        config = AutoConfig.from_pretrained(args.model, **where)
    family_for(config.model_type)
    longest = config.max_position_embeddings - (2 if config.model_type == "roberta" else 0)
    seq_len = args.seq_len or min(512, longest)
    args = args.filled(seq_len, accelerator.num_processes)
    task = make_task(args, kind, tokenizer, seq_len, None)
    with blame(f"--model {args.model}", remedy):
        model = _build(args, kind, task, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.finetune_learning_rate, weight_decay=0.01
    )
    loader: Any = DataLoader(
        task.train,  # type: ignore[arg-type]  # it has the two methods of a Dataset
        batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=collate,
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if not len(loader):
        raise UserError(
            f"--data {args.data}: {len(task.train)} rows do not fill one batch of --batch-size "
            f"{args.batch_size} on {accelerator.num_processes} rank(s): lower --batch-size"
        )
    num_steps = max(1, round(args.finetune_epochs * len(loader)))
    if args.dry_run:
        reporter.say(
            f"{num_steps} steps would finetune {args.model}; what follows needs the result"
        )
        return
    batches = chain.from_iterable(repeat(loader))
    model.train()
    for step, batch in enumerate(islice(batches, num_steps), start=1):
        done = step / (num_steps + 1)
        rate = args.finetune_learning_rate * min(done / WARMUP, (1 - done) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % max(1, num_steps // 20) == 0 or step == num_steps:
            value = float(accelerator.reduce(loss.detach(), "mean"))
            if not math.isfinite(value):
                raise UserError(
                    f"finetuning step {step}: loss is {value}; lower --finetune-learning-rate"
                )
            reporter.say(f"finetune {step:>5}/{num_steps}  loss {value:.4f}")
    plain = accelerator.unwrap_model(model).eval()
    scores = task.evaluate(plain, args.batch_size)
    if accelerator.is_main_process:
        with output as folder:
            try:
                plain.save_pretrained(folder)
            except SafetensorError as error:  # its way of telling that the disk is full
                path = output.path
                raise UserError(f"{path}: cannot be written ({error}); free some space") from error
            tokenizer.save_pretrained(folder)
            text = json.dumps({"settings": record, "scores": scores}, indent=2) + "\n"
            (folder / RECORD_FILE).write_text(text, encoding="utf-8")
    reporter.say(f"finetuned: {scores}")
    accelerator.wait_for_everyone()


def _build(args: PruneArguments, kind: str, task: Task, tokenizer: Any) -> Any:
    """The pretrained model with the task's head, fresh where it had none."""
    auto = getattr(transformers, AUTO_CLASSES[HEADS[kind]])
    labels: dict[str, Any] = {"num_labels": 1} if kind == "regression" else {}
    if task.classes:
        labels["num_labels"] = len(task.classes)
    if task.classes != tuple(map(str, range(len(task.classes)))):  # else they need no names
        labels["id2label"] = dict(enumerate(task.classes))
        labels["label2id"] = {name: i for i, name in enumerate(task.classes)}
    model = auto.from_pretrained(
        args.model, revision=args.revision, dtype=torch.float32, trust_remote_code=False,
        use_safetensors=True, **labels,
    )  # fmt: skip
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
