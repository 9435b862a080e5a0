"""Every option of `prune`: one dataclass field each, checked here before anything expensive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.timing.latency import Pass

STRUCTURES = ("hidden", "heads", "ffn", "layers")
BUDGETS = ("sparsity", "params", "budgets")  # they exclude each other
LIMITS = (*BUDGETS, "macs", "latency_ms")  # one is needed at least
TASKS = ("clm", "mlm", "classification", "regression", "multiple-choice", "qa")
VARIANTS = ("faster", "fast", "vtrans")  # the first leaves the weights as they are
DTYPES = ("auto", "float32", "bfloat16", "float16")
RECOVERIES = ("none", "least-squares", "lora", "full")
LOAD_FORMS = ("full", "4bit", "8bit")
# What belongs to one call, not to the result: left out of recipes.
CALL_FIELDS = ("config", "output", "overwrite", "resume", "dry_run", "quiet", "json")
STEP_TOKENS = 2048  # per rank and micro-batch
NUM_STEPS = {"faster": 900, "fast": 10_000, "vtrans": 10_000}  # on the whole of the data
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": text.replace("%", "%%")}  # argparse formats it
    if choices is not None:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


class Count(int):
    """What makes a plain number of a flag that may also be `auto`: 0."""

    def __new__(cls, value: str | int) -> Any:
        """From a flag or a number."""
        return 0 if value == "auto" else int(value)


@dataclass
class PruneArguments:
    """Options of `llm-vtrans prune`; a YAML recipe has the same names."""

    config: str | None = _option(None, "YAML recipe with these fields; flags win over it.")
    model: str = _option(
        "embedded", "Local checkpoint folder, hub id, or `embedded` (the tiny model shipped here)."
    )
    revision: str | None = _option(None, "Revision of a hub model; its token comes from HF_TOKEN.")
    data: str | None = _option(
        None,
        "Calibration text: wikitext2, c4, ptb, embedded, a hub dataset, or a .txt, .jsonl or "
        ".parquet file or folder. Default: embedded for the embedded model, else wikitext2.",
    )
    data_config: str | None = _option(None, "Configuration of a hub dataset.")
    data_split: str | None = _option(None, "Split of a hub dataset.")
    text_field: str | None = _option(
        None, "Column that holds the text; several, separated by commas, for pairs and choices."
    )
    task: str | None = _option(
        None, "What the model is for. Default: what the checkpoint's head is for.", TASKS
    )
    eval_data: str | None = _option(
        None, "Labelled file to score on. Default: the task's validation split, or the file "
        "validation.* beside --data.",
    )  # fmt: skip
    label_field: str = _option(
        "label", "Column of the label: names or numbers of classes as the model has them."
    )
    finetune_first: bool = _option(
        False, "Train a dense model for --task from the pretrained --model, then prune that."
    )
    finetune_epochs: float = _option(3.0, "Passes over the data of --finetune-first.")
    finetune_learning_rate: float = _option(5e-5, "Largest learning rate of --finetune-first.")
    sparsity: float | None = _option(
        None,
        "Share of ALL parameters to remove, in (0, 1). Default 0.5 unless another budget is given.",
    )
    params: str | None = _option(None, "Parameters to keep at most, such as 3.4B or 4200000.")
    budgets: str | None = _option(
        None,
        "Several shares in place of --sparsity, such as 0.2,0.35,0.5: masks are trained once, at "
        "the one in the middle, and each has its result in a folder of --output.",
    )
    macs: str | None = _option(
        None,
        "Multiply-accumulates of one sequence of --seq-len tokens to keep at most: a share of the "
        "dense model's below 1, or a number such as 1.2T. With --sparsity or --params both hold.",
    )
    latency_ms: float | None = _option(
        None,
        "Milliseconds that a pass of the pruned model may take on this device. With --sparsity, "
        "--params or --macs all hold.",
    )
    latency_shape: str | None = _option(
        None,
        "The pass of --latency-ms: prefill:BxS, a forward pass of B sequences of S tokens, or "
        "decode:B, one new token for each of B, the last of --seq-len. Default: prefill:1x and "
        "--seq-len.",
    )
    variant: str = _option(
        "faster",
        "faster: the weights are frozen. vtrans: they are trained with the masks, then alone, "
        "distilling from the dense model. fast: the same on a share of the data.",
        VARIANTS,
    )
    data_fraction: float | None = _option(
        None,
        "Share of the data that --variant fast uses, and of --samples that it trains on; the "
        "seed picks it. Default 0.03.",
    )
    weight_learning_rate: float = _option(
        5e-5, "Largest learning rate of weights that are trained."
    )
    temperature: float = _option(
        2.0, "Of the distributions compared where weights are trained: above 1 it softens them."
    )
    schedule: str = _option(
        "linear",
        "How the sparsity aimed at rises to the budget: linear over the first tenth (above 60%: "
        "fifth) of the steps, or cubic over their first half.",
        ("linear", "cubic"),
    )
    shrink_every: int = _option(
        0,
        "Steps of the search after which units that the masks have given up leave the network, so "
        "that the next steps are faster. 0, the default: never. For variants that train weights.",
    )
    samples: int = _option(
        0,
        "Calibration sequences to train on, of which --variant fast takes its share. 0, the "
        "default: enough for 900 optimizer steps, 10,000 of vtrans and of fast's whole.",
    )
    tune_share: float = _option(
        0.75,
        "Share of the samples that is used after the units are picked, to tune maps of the "
        "residual stream and a factor at every gate for them. 0: none.",
    )
    token_noise: float = _option(
        0.15,
        "Share of the calibration tokens of a causal LM that random ones replace, so that masks "
        "keep what other texts need. 0: none.",
    )
    own_words: float = _option(
        0.25,
        "Share of the calibration windows of a causal LM that texts of its own replace, for the "
        "same end. 0: none.",
    )
    seq_len: int | None = _option(
        None, "Tokens in a sequence. Default 512, or the model's context if that is shorter."
    )
    batch_size: Count = _option(  # noqa: RUF009  # a field, as all others
        0,
        "Sequences per rank and micro-batch. 0 or auto, the default: as many of a step's as fit "
        "into memory, of 2,048 tokens times --gradient-accumulation; that is raised for more.",
    )
    gradient_accumulation: int = _option(1, "Micro-batches per optimizer step.")
    seed: int = _option(0, "Seed of masks, noise and data order.")
    learning_rate: float = _option(0.1, "Learning rate of the masks, decaying linearly to zero.")
    kl_weight: float = _option(1e-6, "Weight of the masks' KL terms.")
    round_to: str | None = _option(
        None,
        "Multiple that pruned dimensions are rounded to, or auto: the smallest that costs no speed "
        "on this device, measured. Default 1 on CPU, 64 on GPU.",
    )
    layout: str = _option(
        "stock",
        "stock: one shape for all layers, loads in plain transformers. per-layer: every layer "
        "its own shape, the checkpoint carries a small loader.",
        ("stock", "per-layer"),
    )
    prune: str = _option(",".join(STRUCTURES), "Structures to prune, separated by commas.")
    rotate: str = _option(
        "auto",
        "Global rotation of the residual stream before masks are trained. auto: pca where the "
        "family allows it; none where weights are trained that an output head shares, as it would "
        "come apart.",
        ("auto", "pca", "none"),
    )
    dtype: str = _option(
        "auto", "Dtype to compute in. auto: float32 on CPU, bfloat16 on GPU.", DTYPES
    )
    export_dtype: str = _option("auto", "Dtype to write. auto: the dense checkpoint's.", DTYPES)
    gradient_checkpointing: bool = _option(
        False, "Recompute each layer in the backward pass: less memory, a third more time."
    )
    load_in: str = _option(
        "full",
        "Form of the frozen weights during training: full (--dtype), or 4bit or 8bit by "
        "bitsandbytes. The export is cut from the full-precision shards in any case.",
        LOAD_FORMS,
    )
    track: str | None = _option(
        None, "Where to send metrics as well: tensorboard, wandb and others, separated by commas."
    )
    masks: str | None = _option(
        None, "Earlier run whose trained masks serve this budget, instead of training."
    )
    recover: str = _option(
        "none",
        "What the exported network learns from the dense one. least-squares: closed form, layer by "
        "layer, taken if it helps, as with --tune-share 0. lora: low-rank adapters, merged (extra "
        "`recover`). full: all weights.",
        RECOVERIES,
    )
    recover_steps: int = _option(
        0, "Steps of --recover lora or full. 0, the default: as many as make up 1,048,576 tokens."
    )
    output: str | None = _option(None, "Folder of the result. Default runs/MODEL-BUDGET.")
    overwrite: bool = _option(False, "Replace an earlier result in --output.")
    shard_size: str = _option("5GB", "Largest shard of the pruned checkpoint.")
    save_every: int = _option(
        0,
        "Steps between two saved training states. 0, the default: as often as saving takes 2% of "
        "the time at most, at multiples of 100.",
    )
    log_every: int = _option(10, "Steps between two lines of metrics.jsonl.")
    resume: bool = _option(False, "Continue the unfinished run in --output, if there is one.")
    dry_run: bool = _option(False, "Check everything and print the plan, train nothing.")

    quiet: bool = _option(False, "Print nothing but errors.")
    json: bool = _option(False, "Print one JSON object at the end and nothing else.")

    def __post_init__(self) -> None:
        """Checks each value and fills the defaults that depend on others."""
        if self.data is None:
            self.data = "embedded" if self.model == "embedded" else "wikitext2"
        given = [f"--{name}" for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
        if not given and self.macs is None and self.latency_ms is None:
            self.sparsity = 0.5
        flag = "sparsity" if self.budgets is None else "budgets"
        for removed in self.shares() if self.sparsity is None else [self.sparsity]:
            if not 0 < removed < 1:
                raise UserError(
                    f"--{flag} must be in (0, 1), got {removed}: it is the share of all "
                    "parameters that is removed, so 0.3 keeps 70%"
                )
        self._check_variant()
        if self.recover_steps and self.recover not in ("lora", "full"):
            raise UserError(
                f"--recover-steps {self.recover_steps} belongs to --recover lora or full, not to "
                f"{self.recover}: leave it out"
            )
        for name in ("samples", "batch_size", "recover_steps", "shrink_every", "save_every"):
            self._at_least(name, 0)
        for name in ("gradient_accumulation", "log_every"):
            self._at_least(name, 1)
        for name in ("finetune_epochs", "finetune_learning_rate"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be a number above 0, got {value}")
        self._at_least("seed", 0)
        if self.seed >= 2**32:
            raise UserError(f"--seed must be below 2**32, got {self.seed}")
        if self.seq_len is not None:
            self._at_least("seq_len", 2)
        self.multiple()
        if self.latency_ms is None and self.latency_shape is not None:
            raise UserError(f"--latency-shape {self.latency_shape} belongs to --latency-ms: add it")
        if self.latency_ms is not None and not 0 < self.latency_ms < float("inf"):
            raise UserError(f"--latency-ms must be positive, got {self.latency_ms}")
        Pass.parse(self.latency_shape, 1)
        for name in ("tune_share", "token_noise", "own_words"):
            if not 0 <= getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be positive, got {self.learning_rate}")
        if not 0 <= self.kl_weight < float("inf"):
            raise UserError(f"--kl-weight must not be negative, got {self.kl_weight}")
        if self.samples and self.batch_size and self.num_samples() < self.global_batch(1):
            share = f" x --data-fraction {self.fraction}" if self.fraction < 1 else ""
            raise UserError(
                f"--samples {self.samples}{share} does not fill one step of --batch-size "
                f"{self.batch_size} x --gradient-accumulation {self.gradient_accumulation}: lower "
                "these, or give more samples"
            )
        self.structures()
        self.shard_bytes()
        self.num_params()
        self.num_macs(1)

    def trackers(self) -> list[str]:
        """Names of --track, in lower case."""
        names = [name.strip().lower() for name in (self.track or "").split(",")]
        return [name for name in names if name]

    def _check_variant(self) -> None:
        """Checks and fills what depends on the variant."""
        if self.variant == "fast":
            self.data_fraction = 0.03 if self.data_fraction is None else self.data_fraction
        elif self.data_fraction is not None:
            raise UserError(
                f"--data-fraction {self.data_fraction} belongs to --variant fast, not to "
                f"{self.variant}: use --samples to train on fewer"
            )
        if not 0 < self.fraction <= 1:
            raise UserError(f"--data-fraction must be in (0, 1], got {self.data_fraction}")
        for name in ("weight_learning_rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be positive, got {getattr(self, name)}")
        if not self.trains_weights:
            if self.shrink_every:
                raise UserError(
                    f"--shrink-every {self.shrink_every} cuts weights that --variant faster shares "
                    "with its teacher: take --variant vtrans or fast"
                )
            return
        if self.budgets is not None:
            raise UserError(
                f"--budgets {self.budgets} shares the masks of frozen weights, --variant "
                f"{self.variant} trains weights for one budget: give --sparsity, run by run"
            )
        if self.masks is not None:
            raise UserError(
                f"--masks {self.masks} serves frozen weights, --variant {self.variant} trains "
                "weights with masks of their own: leave one of them out"
            )
        if self.dtype == "float16":
            raise UserError(
                f"--dtype float16: gradients of the weights that --variant {self.variant} trains "
                "would underflow; take bfloat16 or float32"
            )

    @property
    def trains_weights(self) -> bool:
        """Whether the variant trains the weights."""
        return self.variant != VARIANTS[0]

    @property
    def recovers(self) -> bool:
        """Whether anything follows export."""
        return self.recover != "none"

    @property
    def fraction(self) -> float:
        """Share of the data that is used."""
        return 1.0 if self.data_fraction is None else self.data_fraction

    def num_samples(self) -> int:
        """Sequences to train on, repeated ones counted, once `filled`."""
        return share_of(self.samples, self.fraction)

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least {least}, got {getattr(self, name)}")

    def filled(self, seq_len: int, num_ranks: int) -> PruneArguments:
        """These options with the defaults that depend on the model and the launch.

        Args:
            seq_len: tokens in a sequence.
            num_ranks: processes of the launch.
        """
        args = replace(self, batch_size=Count(self.batch_size or max(1, STEP_TOKENS // seq_len)))
        whole = NUM_STEPS[self.variant] * args.global_batch(num_ranks)
        return replace(args, samples=args.samples or whole)

    def global_batch(self, num_ranks: int) -> int:
        """Sequences per optimizer step over all ranks, once `filled`."""
        return self.batch_size * self.gradient_accumulation * num_ranks

    def multiple(self) -> int | None:
        """The number of --round-to; None where it depends on the device."""
        if self.round_to in (None, "auto"):
            return None
        if not str(self.round_to).isdecimal() or not int(str(self.round_to)):
            raise UserError(f"--round-to {self.round_to}: expected a number from 1 on, or auto")
        return int(str(self.round_to))

    def structures(self) -> tuple[str, ...]:
        """The structures to prune, in canonical order."""
        names = [name.strip() for name in self.prune.split(",") if name.strip()]
        unknown = [name for name in names if name not in STRUCTURES]
        if unknown or not names:
            raise UserError(
                f"--prune {self.prune!r}: expected names out of {', '.join(STRUCTURES)}"
            )
        return tuple(name for name in STRUCTURES if name in names)

    def shard_bytes(self) -> int:
        """Largest shard in bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", self.shard_size.strip().upper())
        if match is None or match[2] not in SIZES or not float(match[1]):
            raise UserError(f"--shard-size {self.shard_size!r}: expected a size such as 5GB")
        return int(float(match[1]) * SIZES[match[2]])

    def shares(self) -> list[float]:
        """The several sparsities of --budgets, or none."""
        if self.budgets is None:
            return []
        shares = [_number(text) for text in self.budgets.split(",")]
        if not all(shares) or len(set(shares)) < len(shares):
            raise UserError(f"--budgets {self.budgets!r}: expected shares such as 0.2,0.35,0.5")
        return shares

    def num_params(self) -> int | None:
        """The absolute budget of --params, or None."""
        if self.params is None:
            return None
        number = _number(self.params)
        if number < 1:
            raise UserError(f"--params {self.params!r}: expected a number such as 3.4B or 4200000")
        return int(number)

    def num_macs(self, dense: int) -> int | None:
        """The absolute budget of --macs for a dense model of `dense`, or None."""
        if self.macs is None:
            return None
        number = _number(self.macs)
        if not number:
            raise UserError(
                f"--macs {self.macs!r}: expected a share such as 0.5, or a number such as 1.2T"
            )
        return int(number * dense) if number < 1 else int(number)

    def output_folder(self) -> Path:
        """Where the result goes."""
        if self.output is not None:
            return Path(self.output).expanduser()
        share = f"{self.sparsity:g}" if self.sparsity else None
        budget = [self.params or self.budgets or share]
        budget += [f"{self.macs}macs"] if self.macs else []
        budget += [f"{self.latency_ms:g}ms"] if self.latency_ms else []
        return Path("runs") / "-".join([Path(self.model).name, *filter(None, budget)])


def share_of(num: int, fraction: float) -> int:
    """A share of some examples, one at least."""
    return max(1, round(fraction * num))


def _number(text: str) -> float:
    """A count such as 3.4B, or 0 for what is none."""
    match = re.fullmatch(r"(\d*(?:\.\d+)?)([KMBT]?)", str(text).strip().upper())
    return float(match[1]) * SUFFIXES[match[2]] if match and match[1] else 0.0
