"""Options and a checked checkpoint -> what the run will do, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.basis.rotation import rotated_architecture
from llm_vtrans.budget.cost import Budget, Limit, dense_shape, mac_cost, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.families.base import Norm, head_of
from llm_vtrans.loading.source import Source, check_known, load_tokenizer
from llm_vtrans.preparation.resources import tokens_of_window
from llm_vtrans.tasks import HEADS, Task, make_task, task_of
from llm_vtrans.tasks.encoding import with_noise
from llm_vtrans.timing.latency import Pass
from llm_vtrans.timing.latency_cost import table_sizes
from llm_vtrans.timing.rounding import best_multiple
from llm_vtrans.timing.stopwatch import Stopwatch
from llm_vtrans.timing.timed_choice import AIM
from llm_vtrans.training.loop import TrainingSettings


def rotates(args: PruneArguments, source: Source) -> bool:
    """Whether the residual stream is rotated before masks are trained.

    Raises:
        UserError: `--rotate pca` for a model whose norms do not allow it.
    """
    architecture = source.architecture
    if args.rotate == "pca" and not architecture.rotates:
        raise UserError(f"--rotate pca: {source.config.model_type} does not allow a rotation")
    if args.rotate == "pca" and args.trains_weights and architecture.norm is Norm.LAYER:
        raise UserError(
            f"--rotate pca with --variant {args.variant}: LayerNorms are rotated with frozen "
            "weights alone; use --variant faster"
        )
    # A tied table that is trained would have to come apart: its two parts learn differently.
    fits = architecture.rotates and not (architecture.tied_head and args.trains_weights)
    is_wanted = args.rotate == "pca" or (args.rotate == "auto" and fits)
    return is_wanted and "hidden" in args.structures()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `--dtype` means on a device."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pruned_architecture(args: PruneArguments, source: Source) -> Architecture:
    """The table of what is pruned: after rotation, if weights are trained with it."""
    architecture = source.architecture
    is_apart = args.trains_weights and rotates(args, source)
    return rotated_architecture(architecture) if is_apart else architecture


def make_stopwatch(args: PruneArguments, source: Source, device: torch.device) -> Stopwatch | None:
    """Times networks for `--latency-ms`; None without it.

    Raises:
        UserError: a pass that the model does not have.
    """
    if args.latency_ms is None:
        return None
    timed = Pass.parse(args.latency_shape, window_length(args, source))
    longest = source.architecture.max_positions
    if timed.seq_len > longest:
        raise UserError(f"--latency-shape {timed}: the model's context is {longest} tokens")
    if timed.is_decode and AUTO_CLASSES[head_of(source.config)] != AUTO_CLASSES["ForCausalLM"]:
        raise UserError(f"--latency-shape {timed}: this model does not generate; give prefill:BxS")
    if timed.is_decode and timed.seq_len < 2:
        raise UserError(f"--latency-shape {timed}: has no context; give --seq-len 2 or more")
    if is_deepspeed_zero3_enabled():
        raise UserError("--latency-ms: ZeRO-3 slices what is timed; use another launch file")
    architecture = pruned_architecture(args, source)
    return Stopwatch(source, architecture, timed, compute_dtype(args.dtype, device), device)


def make_problem(
    args: PruneArguments, source: Source, device: torch.device, stopwatch: Stopwatch | None = None
) -> Problem:
    """Budgets, rounding and layout of a run.

    Args:
        args: checked options.
        source: the dense checkpoint.
        device: that the run computes on.
        stopwatch: by `make_stopwatch`, for a budget of time.

    Raises:
        UserError: a budget that is not below what the model needs.
    """
    architecture = pruned_architecture(args, source)
    round_to = _round_to(args, device)
    first, *more = [
        *_params_limit(args, source, architecture),
        *_macs_limit(args, source),
        *_latency_limit(args, stopwatch, round_to),
    ]
    return Problem(
        architecture, first.cost, first.budget, round_to, args.layout == "stock", tuple(more)
    )


def _round_to(args: PruneArguments, device: torch.device) -> int:
    """The multiple of `--round-to`, measured where that is asked for."""
    if args.round_to == "auto":
        return best_multiple(device, compute_dtype(args.dtype, device))
    return args.multiple() or default_multiple(device)


def default_multiple(device: torch.device) -> int:
    """Of pruned dimensions: a GPU takes three times as long for odd ones."""
    return 64 if device.type == "cuda" else 1


def _params_limit(
    args: PruneArguments, source: Source, architecture: Architecture
) -> Iterator[Limit]:
    """The limit of `--sparsity` or `--params`, if either is given."""
    dense = dense_params(source)
    target = args.num_params() or int((1 - (args.sparsity or 0.0)) * dense)
    if args.params is None and args.sparsity is None:
        return
    if not 0 < target < dense:
        raise UserError(
            f"--params {args.params}: the model has {dense:,} parameters, give a smaller number"
        )
    yield Limit(parameter_cost(architecture), Budget("params", target, dense))


def _macs_limit(args: PruneArguments, source: Source) -> Iterator[Limit]:
    """The limit of `--macs`, if it is given."""
    cost = mac_cost(source.architecture, window_length(args, source))
    dense = cost.of(dense_shape(source.architecture))
    target = args.num_macs(dense)
    if target is None:
        return
    if not 0 < target < dense:
        raise UserError(f"--macs {args.macs}: the model needs {dense:,}, give a smaller number")
    yield Limit(cost, Budget("MACs", target, dense))


def _latency_limit(
    args: PruneArguments, stopwatch: Stopwatch | None, round_to: int
) -> Iterator[Limit]:
    """The limit of `--latency-ms`, if it is given; what it costs is measured here."""
    if stopwatch is None or args.latency_ms is None:
        return
    architecture = stopwatch.architecture
    size = architecture.num_units[Axis.HIDDEN]
    is_pruned = Axis.HIDDEN in args.structures()
    cost = stopwatch.table(table_sizes(size, round_to) if is_pruned else [size])
    asked = int(1e6 * args.latency_ms)
    budget = Budget("ns", int(AIM * asked), cost.of(dense_shape(architecture)), asked)
    if budget.target >= budget.dense:
        raise UserError(
            f"--latency-ms {args.latency_ms:g}: the model takes {budget.text(budget.dense)} "
            f"({stopwatch.timed}), give a smaller number"
        )
    yield Limit(cost, budget)


def dense_params(source: Source) -> int:
    """Parameters of the model as it is, tied ones once."""
    return parameter_cost(source.architecture).of(dense_shape(source.architecture))


def window_length(args: PruneArguments, source: Source) -> int:
    """Tokens in a calibration window.

    Raises:
        UserError: longer than the model's context.
    """
    return tokens_of_window(args.seq_len, source.architecture)


def task_data(args: PruneArguments, source: Source, seq_len: int) -> Task:
    """The run's task and its data in the model's own tokens.

    Raises:
        UserError: data that cannot be read or is too little, a head that does not fit the
            task, or a tokenizer of another model.
    """
    kind = task_of(args, head_of(source.config), source.config.num_labels)
    tokenizer = load_tokenizer(source)
    own = source.config.id2label
    data = make_task(args, kind, tokenizer, seq_len, args.samples, args.fraction, own)
    if source.config.pad_token_id is None and HEADS[kind] == "ForSequenceClassification":
        # A decoder answers at the last token that is no padding.
        source.config.pad_token_id = tokenizer.pad_token_id
    known = {"input_ids": ("token", source.config.vocab_size)}
    if "token_type_ids" in data.train.tensors:
        known["token_type_ids"] = ("token type", source.config.type_vocab_size)
    for name, (what, number) in known.items():
        largest = max(int(part.tensors[name].max()) for part in (data.train, data.heldout))
        check_known(args.model, what, largest, number)
    if len(data.classes) > source.config.num_labels:
        raise UserError(
            f"--data {args.data}: {len(data.classes)} classes, the model has "
            f"{source.config.num_labels}; --finetune-first makes a model for them"
        )
    if kind == "clm" and args.token_noise:
        special = set(tokenizer.all_special_ids)
        tokens = sorted({*range(min(len(tokenizer), source.config.vocab_size))} - special)
        noisy = with_noise(data.train, args.token_noise, torch.tensor(tokens), args.seed)
        return replace(data, train=noisy)
    return data


def training_settings(args: PruneArguments, num_ranks: int) -> TrainingSettings:
    """The loop's numbers for this many ranks.

    Raises:
        UserError: too few samples for one step.
    """
    batch = args.global_batch(num_ranks)
    if args.num_samples() < batch:
        raise UserError(
            f"--samples {args.samples} does not fill one step of {batch} sequences on "
            f"{num_ranks} ranks: lower --batch-size"
        )
    num_steps = args.num_samples() // batch
    tune_steps = int(args.tune_share * num_steps)  # a share below 1 leaves a step to search in
    return TrainingSettings(
        search_steps=num_steps - tune_steps,
        tune_steps=tune_steps,
        batch_size=args.batch_size,
        gradient_accumulation=args.gradient_accumulation,
        learning_rate=args.learning_rate,
        kl_weight=args.kl_weight,
        seed=args.seed,
        log_every=args.log_every,
        save_every=args.save_every,
        is_uniform=args.layout == "stock",
        schedule=args.schedule,
    )
