"""One pruning run: the stages in order, each leaving what the next one needs."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llm_vtrans.allocation import Problem, PrunePlan, allocate, check_reachable
from llm_vtrans.arguments import PruneArguments, recipe
from llm_vtrans.attachment import MaskedModel
from llm_vtrans.budget import Cost, dense_shape, mac_cost, parameter_cost
from llm_vtrans.checkpoint import Checkpoint
from llm_vtrans.errors import UserError, blame
from llm_vtrans.export import Pruning, export_model
from llm_vtrans.families import Architecture
from llm_vtrans.families.base import Axis
from llm_vtrans.head_basis import HeadBasis, balanced_basis
from llm_vtrans.loading import Source, load_model, open_source, untie_head
from llm_vtrans.manifest import (
    CARD_FILE,
    RECIPE_FILE,
    check_masks,
    dtype_name,
    figures,
    kept_units,
    plan_tensors,
    read_masks,
    write_manifest,
    write_masks,
)
from llm_vtrans.masks import VIBMasks
from llm_vtrans.model_card import PIPELINES, base_license, model_card
from llm_vtrans.output_folder import OutputFolder, atomic_write_text
from llm_vtrans.planning import (
    dense_params,
    make_problem,
    rotates,
    task_data,
    training_settings,
    window_length,
)
from llm_vtrans.redaction import redact
from llm_vtrans.report.build import write_run_report
from llm_vtrans.reporting import (
    METRICS_FILE,
    Reporter,
    command_line,
    truncate_metrics,
    versions,
)
from llm_vtrans.rotation import principal_basis, rotate_model
from llm_vtrans.run_state import STATE_FILE, extra_tensors, read_state, restore, save_state
from llm_vtrans.search import (
    INITIAL_LOG_VAR,
    SearchObjective,
    complete_layers,
    initial_shapes,
)
from llm_vtrans.tasks import Task
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training import Objective, TrainingSettings, train
from llm_vtrans.tune import TuneObjective
from llm_vtrans.tuning import Tuning
from llm_vtrans.verification import sha256_of, windows_sha256

STATE_FOLDER = STATE_FILE.split("/")[0]
RESULT_KEYS = (  # of the manifest, in the order in which --json prints them
    "source", "layout", "budget", "params", "macs", "bytes", "perplexity", "kept", "phases",
)  # fmt: skip
TUNING = "tuning."  # prefix of tensors on disk
ROTATION_WINDOWS = 128  # enough tokens for a second moment of any usual hidden size


@dataclass
class Job:
    """A run between its stages; `prepare` makes it, the other methods are called in order.

    Attributes:
        args: checked options.
        accelerator: ranks and device.
        reporter: what the run tells.
        source: the dense checkpoint.
        architecture: its table, after rotation if there is one.
        problem: budget, rounding and layout.
        settings: of the training loop.
        data: the task with its examples.
        output: the result's folder.
        saved: step and tensors of the unfinished run to continue.
    """

    args: PruneArguments
    accelerator: Accelerator
    reporter: Reporter
    source: Source
    architecture: Architecture
    problem: Problem
    settings: TrainingSettings
    data: Task
    output: OutputFolder
    perplexity: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    rotation: Tensor | None = None
    head_basis: HeadBasis | None = None
    saved: tuple[int, dict[str, Tensor]] | None = None

    # Filled by `load` and `allocate`.
    masked: MaskedModel = field(init=False)
    masks: VIBMasks = field(init=False)
    tuning: Tuning = field(init=False)
    is_searched: bool = field(init=False)
    found: dict[str, Tensor] = field(default_factory=dict)
    plan: PrunePlan = field(init=False)

    @classmethod
    def prepare(cls, args: PruneArguments) -> Job:
        """Checks everything that can be checked without loading weights.

        Raises:
            UserError: model, data, budget or output folder cannot be used.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation)
        set_seed(args.seed)
        reporter = Reporter(accelerator.is_main_process, args.quiet or args.json)
        resumes = args.resume and (args.output_folder() / STATE_FILE).is_file()
        output = OutputFolder(args.output_folder(), args.overwrite or resumes, (STATE_FOLDER,))
        with accelerator.main_process_first():
            output.check()
        source = open_source(args.model, args.revision)
        problem = make_problem(args, source, accelerator.device)
        check_reachable(problem, frozenset(args.structures()))
        output.require_space(2 * source.checkpoint.num_bytes)
        seq_len = window_length(args, source)
        with reporter.phase("calibration"):
            data = task_data(args, source, seq_len)
        settings = training_settings(args, accelerator.num_processes)
        reporter.num_steps = settings.num_steps
        job = cls(
            args, accelerator, reporter, source, problem.architecture, problem, settings, data,
            output,
        )  # fmt: skip
        job.saved = job._saved_state()
        return job

    @property
    def seq_len(self) -> int:
        """Tokens in a calibration window; MACs are stated for this length."""
        return window_length(self.args, self.source)

    @property
    def uses_rotation(self) -> bool:
        """Whether the residual stream is rotated before masks are trained."""
        return rotates(self.args, self.source)

    @cached_property
    def macs(self) -> Cost:
        """Multiply-accumulates for one sequence."""
        return mac_cost(self.architecture, self.seq_len)

    def show_plan(self) -> None:
        """Prints what is going to happen."""
        args = self.args
        aims = " and ".join(
            f"from {limit.budget.dense:,} to at most {limit.budget.target:,} {limit.budget.kind} "
            f"({100 * limit.budget.sparsity:.1f}% less)"
            for limit in self.problem.limits
        )
        self.reporter.say(
            f"{args.model}: {self.source.config.model_type}, {aims}\n"
            f"prune {', '.join(args.structures())}; layout {args.layout}; rotation "
            f"{'pca' if self.uses_rotation else 'none'}; dimensions in multiples of "
            f"{self.problem.round_to}\n"
            f"{self.settings.num_steps} steps of {args.global_batch(self._num_ranks)} x "
            f"{self.seq_len} tokens of {args.data} on {self._num_ranks} rank(s), "
            f"{self.accelerator.device.type}, {dtype_name(self._dtype)}\n"
            f"result in {args.output_folder()}"
        )
        if args.json and args.dry_run and self.accelerator.is_main_process:
            plan = {"output": str(args.output_folder()), "budget": asdict(self.problem.budget),
                    "layout": args.layout, "steps": self.settings.num_steps}  # fmt: skip
            print(json.dumps(plan))

    @property
    def _num_ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def _dtype(self) -> torch.dtype:
        if self.args.dtype != "auto":
            return getattr(torch, self.args.dtype)
        return torch.bfloat16 if self.accelerator.device.type == "cuda" else torch.float32

    def load(self) -> None:
        """Loads and rotates the model, hooks tuning and masks onto it."""
        known = self._trained_masks() if self.saved is None else extra_tensors(self.saved[1])
        with self.reporter.phase("load"):
            model = load_model(self.source, self._dtype, self.accelerator.device)
        self.scores["dense"] = self.data.evaluate(model, self.args.batch_size)
        self.perplexity["dense"] = self.scores["dense"][self.data.headline]
        if self.architecture.couples_heads:
            with self.reporter.phase("heads"):
                self.head_basis = balanced_basis(
                    model, self.architecture, self._first_batches(), lambda b: model(**b)
                )
                self.problem = replace(self.problem, head_retention=self.head_basis.retained)
        if self.uses_rotation:
            with self.reporter.phase("rotate"):
                self._rotate(model, known.get("rotation"))
        device = self.accelerator.device
        self.tuning = Tuning(self.architecture, self.uses_rotation).to(device)
        self.masked = MaskedModel(model, self.architecture, self.tuning)
        shapes = initial_shapes(self.architecture, self.args.structures(), self.problem.is_uniform)
        shapes |= {n[3:]: tuple(t.shape) for n, t in known.items() if n.startswith("mu.")}
        self.masks = VIBMasks(shapes, INITIAL_LOG_VAR, self.args.seed).to(device)
        self.is_searched = any(name.startswith("mu.") for name in known)
        if self.is_searched:
            self.masks.load_state_dict({name: known[name] for name in self.masks.state_dict()})
            self.tuning.load_state_dict(
                {n[7:]: t for n, t in known.items() if n.startswith("tuning.")}
            )
        if self.accelerator.is_main_process:
            self._open_state_folder()

    def _trained_masks(self) -> dict[str, Tensor]:
        """Tensors of the earlier run that `--masks` names, or none."""
        if self.args.masks is None:
            return {}
        trained = read_masks(Path(self.args.masks), self.source.checkpoint.sha256())
        structures = {n[3:] for n in trained if n.startswith("mu.")}
        if structures != set(self.args.structures()):
            raise UserError(
                f"--masks {self.args.masks}: trained with --prune {','.join(sorted(structures))}; "
                f"give the same instead of {self.args.prune}"
            )
        if ("rotation" in trained) != self.uses_rotation:
            given = "pca" if "rotation" in trained else "none"
            raise UserError(
                f"--masks {self.args.masks}: trained with --rotate {given}; give it too"
            )
        check_masks(trained, self._mask_shapes(), f"--masks {self.args.masks}")
        return trained

    def _mask_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes that tensors of an earlier run may have: masks serve both layouts."""
        names = self.args.structures()
        layouts = [initial_shapes(self.architecture, names, uniform) for uniform in (True, False)]
        shapes = {
            f"{part}.{name}": [layout[name] for layout in layouts]
            for part in ("mu", "log_var")
            for name in names
        }
        with torch.device("meta"):
            tuning = Tuning(self.architecture, self.uses_rotation).state_dict()
        shapes |= {f"{TUNING}{name}": [tuple(tensor.shape)] for name, tensor in tuning.items()}
        hidden = self.architecture.num_units[Axis.HIDDEN]
        return {**shapes, "rotation": [(hidden, hidden)]} if self.uses_rotation else shapes

    def _open_state_folder(self) -> None:
        """Keeps what the saved state covers, or starts anew; an earlier result is not touched."""
        folder = self.output.path / STATE_FOLDER
        if self.saved is not None:
            truncate_metrics(folder, self.saved[0])
        else:
            self._remove_state()
            folder.mkdir(parents=True, exist_ok=True)

    def _remove_state(self) -> None:
        """Removes the state, and what a kill left of one that was being written."""
        state = self.output.path / STATE_FILE
        halves = state.parent.glob(f".{state.name}.partial-*")
        for path in (state, state.with_name(METRICS_FILE), *halves):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there: it is not ours to delete
            state.parent.rmdir()

    def _rotate(self, model: PreTrainedModel, basis: Tensor | None) -> None:
        if self.source.architecture.tied_head is not None:
            untie_head(model)
        if basis is None:
            basis = principal_basis(
                model, self.architecture, self._first_batches(), lambda b: model(**b)
            )
        self.rotation = basis
        rotate_model(model, self.architecture, basis)

    def _first_batches(self) -> list[Batch]:
        """Inputs from the training data, the same on every rank, for second moments."""
        first = self.data.train.take(torch.arange(min(ROTATION_WINDOWS, len(self.data.train))))
        batches = first.batches(self.args.batch_size, self.accelerator.device)
        return [inputs_of(batch) for batch in batches]

    def _saved_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The unfinished run in the output folder, if it is to be continued."""
        folder = self.output.path
        exists = (folder / STATE_FILE).is_file()
        if exists and not (self.args.resume or self.args.overwrite):
            raise UserError(
                f"{folder} holds an unfinished run: --resume continues it, --overwrite starts anew"
            )
        return read_state(folder, self._fingerprint) if self.args.resume else None

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """Settings that a resumed run must share; ranks may differ if the global batch does not."""
        free = {"config", "output", "overwrite", "resume", "dry_run", "save_every", "log_every",
                "quiet", "json", "shard_size", "export_dtype", "batch_size",
                "gradient_accumulation"}  # fmt: skip
        settings = {k: v for k, v in asdict(self.args).items() if k not in free}
        return {
            **settings,
            "global_batch": self.args.global_batch(self._num_ranks),
            "checkpoint": self.source.checkpoint.sha256(),
        }

    def search(self) -> None:
        """Trains the masks, unless an earlier run did."""
        if self.is_searched:
            return
        objective = SearchObjective(self.masked, self.masks, self.problem.limits, self.settings)
        with self.reporter.phase("search"):
            self._train(objective, self._rotation())

    def allocate(self) -> None:
        """Picks the kept units and measures the hard-masked model, in both layouts."""
        tuning = {TUNING + name: t.clone() for name, t in self.tuning.state_dict().items()}
        self.found = {**self.masks.state_dict(), **tuning}
        with self.reporter.phase("allocate"):
            self.plan = self._allocate(self.problem)
            other = replace(self.problem, is_uniform=not self.problem.is_uniform)
            self.perplexity["hardened"] = self._masked_perplexity(self.plan)
            with suppress(UserError):  # the other layout may have no shape within the budget
                plan = self._allocate(other)
                self.perplexity["other_layout"] = self._masked_perplexity(plan)

    def _allocate(self, problem: Problem) -> PrunePlan:
        return replace(allocate(self.masks, problem), basis=self.head_basis)

    def tune(self) -> None:
        """Trains maps and factors for the units that stay."""
        if not self.settings.tune_steps:
            return
        sparsity = 1 - self.problem.cost.of(self.plan.shape) / self.problem.budget.dense
        objective = TuneObjective(self.masked, self._hard_gates(self.plan), sparsity, self.settings)
        with self.reporter.phase("tune"):
            self._train(objective, {**self._rotation(), **self.found})
            self.perplexity["tuned"] = self._masked_perplexity(self.plan)

    def _rotation(self) -> dict[str, Tensor]:
        return {} if self.rotation is None else {"rotation": self.rotation}

    def _train(self, objective: Objective, record: dict[str, Tensor]) -> None:
        """Runs a stage from its beginning, or from the saved state."""
        objective.to(self.accelerator.device)
        optimizer = objective.optimizer()
        first_step = objective.stage.start
        if self.saved is not None:
            first_step, tensors = self.saved
            self.saved = None
            with blame(self.output.path / STATE_FILE, "start with --overwrite"):
                restore(tensors, objective, optimizer)
            self.reporter.say(f"resumed after step {first_step}")

        def save(step: int) -> None:
            if self.accelerator.is_main_process:
                save_state(self.output.path, step, objective, optimizer, record, self._fingerprint)

        train(
            objective,
            optimizer,
            self.data.train,
            self.accelerator,
            self.settings,
            first_step,
            lambda progress: self.reporter.progress(self.output.path / STATE_FOLDER, progress),
            save,
        )

    def _hard_gates(self, plan: PrunePlan) -> dict[str, Tensor]:
        hard = {name: gate.to(self.accelerator.device) for name, gate in plan.hard().items()}
        return complete_layers(hard, self.architecture)

    def _masked_perplexity(self, plan: PrunePlan) -> float:
        self.masked.set_gates(self._hard_gates(plan))
        perplexity = self._heldout(self.masked.model)
        self.masked.set_gates(None)
        return perplexity

    def _heldout(self, model: Any) -> float:
        return self.data.evaluate(model, self.args.batch_size)[self.data.headline]

    def export(self) -> None:
        """Writes the pruned checkpoint and its record on rank zero; other ranks wait."""
        if self.accelerator.is_main_process:
            with self.output as folder:
                self._write(folder)
            self._remove_state()
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        args = self.args
        dtype = None if args.export_dtype == "auto" else getattr(torch, args.export_dtype)
        pruning = Pruning(
            self.source.checkpoint, self.architecture, self.plan,
            self.tuning.basis(self.rotation), dtype, self.tuning.factors(),
        )  # fmt: skip
        with self.reporter.phase("export"):
            hashes = export_model(
                pruning, self.source.family, self.source.config, self.problem.is_uniform, folder,
                args.shard_bytes(),
            )  # fmt: skip
            write_masks(
                folder,
                {**self.found, **plan_tensors(self.plan, self.rotation, self.tuning)},
                self.source.checkpoint.sha256(),
            )
        with self.reporter.phase("score"):
            pruned = self.source.auto_class.from_pretrained(
                folder, dtype=self._dtype, trust_remote_code=False
            ).to(self.accelerator.device)
            self.scores["pruned"] = self.data.evaluate(pruned, self.args.batch_size)
            self.perplexity["pruned"] = self.scores["pruned"][self.data.headline]
        metrics = self.output.path / STATE_FOLDER / METRICS_FILE
        if metrics.is_file():  # there are none where `--masks` took the place of training
            shutil.copyfile(metrics, folder / METRICS_FILE)
        atomic_write_text(folder / RECIPE_FILE, redact(recipe(self.args)))
        rest = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
        manifest = self._manifest(folder, {**rest, **hashes})
        write_manifest(folder, manifest)
        self.summary = figures(manifest)
        self.result = {key: manifest[key] for key in RESULT_KEYS}
        atomic_write_text(folder / CARD_FILE, redact(model_card(manifest, self.summary)))
        write_run_report(folder, self.output.path.name)

    def _manifest(self, folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
        shape = self.plan.shape
        written = Checkpoint.open(folder)
        num_written = sum(torch.Size(info.shape).numel() for info in written.tensors.values())
        num_params = parameter_cost(self.architecture).of(shape)
        assert num_written == num_params, (num_written, num_params)
        dense = dense_shape(self.source.architecture)
        dense_cost = parameter_cost(self.source.architecture)
        dense_macs = mac_cost(self.source.architecture, self.seq_len)
        budgets = [
            {**asdict(limit.budget), "achieved": limit.cost.of(shape)}
            for limit in self.problem.limits
        ]
        return {
            "method": "faster-vtrans",
            "source": {
                "name": self.args.model,
                "revision": self.args.revision,
                "sha256": self.source.checkpoint.sha256(),
                "license": base_license(
                    self.source.checkpoint.folder, self.source.checkpoint.config
                ),
            },
            "params": {"before": dense_params(self.source), "after": num_params},
            "macs": {
                "before": dense_macs.of(dense),
                "after": self.macs.of(shape),
                "seq_len": self.seq_len,
            },
            "bytes": {"before": self.source.checkpoint.num_bytes, "after": written.num_bytes},
            "budget": budgets[0],
            "also": budgets[1:],
            "kept": kept_units(shape),
            "units": {axis.value: n for axis, n in self.architecture.num_units.items()},
            "parts": _by_part(dense_cost.split(dense), self.problem.cost.split(shape)),
            "mac_parts": _by_part(dense_macs.split(dense), self.macs.split(shape)),
            "layout": self.args.layout,
            "rotation": "pca" if self.rotation is not None else "none",
            "task": self.data.kind,
            "pipeline_tag": PIPELINES[self.data.kind],
            "auto_class": self.source.auto_class.__name__,
            # Of each stage the headline score; a language model's is its perplexity.
            "perplexity" if self.data.kind == "clm" else "score": {
                **self.perplexity,
                "protocol": self.data.protocol,
                "windows_sha256": windows_sha256(self.data.heldout.tensors["input_ids"]),
            },
            "headline": self.data.headline,
            "scores": self.scores,
            "settings": {**asdict(self.args), "steps": self.settings.num_steps},
            "command": command_line(),
            "phases": self.reporter.record(),
            "versions": versions(),
            "computed_in": {
                "device": self.accelerator.device.type, "dtype": dtype_name(self._dtype),
            },
            "sha256": hashes,
        }  # fmt: skip

    def summarise(self) -> None:
        """Prints the table of dense against pruned and where the result lies."""
        if self.accelerator.is_main_process:
            self.reporter.say(f"\n{self.summary}\n\n{self.args.output_folder()}")
            if self.args.json:
                print(json.dumps({"output": str(self.args.output_folder()), **self.result}))
        self.accelerator.end_training()


def _by_part(before: dict[str, int], after: dict[str, int]) -> dict[str, dict[str, int]]:
    return {name: {"before": before[name], "after": after[name]} for name in before}
