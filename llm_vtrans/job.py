"""One pruning run: the stages in order, each leaving what the next one needs."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llm_vtrans.allocation import Problem, PrunePlan, allocate, check_reachable
from llm_vtrans.arguments import PruneArguments
from llm_vtrans.attachment import MaskedModel
from llm_vtrans.budget import Cost, dense_shape, mac_cost
from llm_vtrans.calibration import Calibration
from llm_vtrans.checkpoint import Checkpoint
from llm_vtrans.distillation import SelfDistillation
from llm_vtrans.errors import UserError
from llm_vtrans.export import Pruning, export_model, plan_tensors
from llm_vtrans.families import Architecture
from llm_vtrans.loading import Source, Weights, fill_model, load_model, open_source
from llm_vtrans.manifest import (
    CARD_FILE,
    dtype_name,
    figures,
    kept_units,
    model_card,
    read_masks,
    write_manifest,
    write_masks,
)
from llm_vtrans.masks import VIBMasks
from llm_vtrans.output_folder import MANIFEST_FILE, OutputFolder
from llm_vtrans.planning import (
    calibration_data,
    make_problem,
    rotates,
    training_settings,
    window_length,
)
from llm_vtrans.preemption import Preemption
from llm_vtrans.quantised import FULL, check_form
from llm_vtrans.reporting import (
    METRICS_FILE,
    Reporter,
    command_line,
    truncate_metrics,
    versions,
)
from llm_vtrans.rotation import principal_basis, rotate_model
from llm_vtrans.run_state import STATE_FILE, extra_tensors, read_state, restore, save_state
from llm_vtrans.scoring import token_perplexity
from llm_vtrans.training import (
    INITIAL_LOG_VAR,
    MaskObjective,
    Progress,
    TrainingSettings,
    complete_layers,
    initial_shapes,
    make_optimizer,
    train,
)
from llm_vtrans.zero3 import attach, configure, is_partitioned

STATE_FOLDER = STATE_FILE.split("/")[0]
TRACKING_FOLDER = "tracking"  # beside the results, for trackers that write files
EXPORT_TIMEOUT = timedelta(hours=2)  # other ranks wait while rank zero writes
ROTATION_WINDOWS = 128  # enough tokens for a second moment of any usual hidden size
FREE_SETTINGS = {  # a resumed run may have others
    "config", "output", "overwrite", "resume", "dry_run", "save_every", "log_every", "shard_size",
    "export_dtype", "batch_size", "gradient_accumulation", "gradient_checkpointing", "track",
}  # fmt: skip


def is_finished(args: PruneArguments) -> bool:
    """Whether the output folder holds this run's result: a requeued job may find it there."""
    folder = args.output_folder()
    if (folder / STATE_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        return False
    found = json.loads((folder / MANIFEST_FILE).read_text())["settings"]
    now = asdict(args)
    return all(found[key] == now[key] for key in found.keys() & now.keys() - FREE_SETTINGS)


def _trackers(args: PruneArguments) -> list[str] | None:
    """Accelerate's trackers that `--track` names.

    Raises:
        UserError: one of them is unknown or not installed.
    """
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in args.trackers():
        if name not in available:
            raise UserError(
                f"--track {name}: not installed; there are {', '.join(available) or 'none'} "
                "(pip install tensorboard, wandb, ...)"
            )
    return args.trackers() or None


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
        data: calibration windows.
        output: the result's folder.
        preemption: tells when a signal asks the run to go.
        saved: step and tensors of the unfinished run to continue.
    """

    args: PruneArguments
    accelerator: Accelerator
    reporter: Reporter
    source: Source
    architecture: Architecture
    problem: Problem
    settings: TrainingSettings
    data: Calibration
    output: OutputFolder
    preemption: Preemption
    perplexity: dict[str, float] = field(default_factory=dict)
    basis: Tensor | None = None
    saved: tuple[int, dict[str, Tensor]] | None = None

    # Filled by `load` and `allocate`.
    masked: MaskedModel = field(init=False)
    objective: MaskObjective = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    plan: PrunePlan = field(init=False)
    masks: VIBMasks = field(init=False)
    first_step: int = 0

    @classmethod
    def prepare(cls, args: PruneArguments, preemption: Preemption) -> Job:
        """Checks everything that can be checked without loading weights.

        Raises:
            UserError: model, data, budget or output folder cannot be used.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=EXPORT_TIMEOUT)],
            log_with=_trackers(args),
            project_dir=args.output_folder().parent / TRACKING_FOLDER,
        )
        set_seed(args.seed)
        check_form(args.load_in, accelerator)
        reporter = Reporter(accelerator.is_main_process)
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
            data = calibration_data(args, source, seq_len)
        settings = training_settings(args, accelerator.num_processes)
        reporter.num_steps = settings.num_steps
        job = cls(
            args, accelerator, reporter, source, problem.architecture, problem, settings, data,
            output, preemption,
        )  # fmt: skip
        job.saved = job._saved_state()
        return job

    @property
    def seq_len(self) -> int:
        """Tokens in a calibration window; MACs are stated for this length."""
        return int(self.data.train.shape[1])

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
        budget, args = self.problem.budget, self.args
        self.reporter.say(
            f"{args.model}: {self.source.config.model_type}, {budget.dense:,} parameters, "
            f"to at most {budget.target:,} ({100 * budget.sparsity:.1f}% less)\n"
            f"prune {', '.join(args.structures())}; layout {args.layout}; rotation "
            f"{'pca' if self.uses_rotation else 'none'}; dimensions in multiples of "
            f"{self.problem.round_to}\n"
            f"{self.settings.num_steps} steps of {args.global_batch(self._num_ranks)} x "
            f"{self.seq_len} tokens of {args.data} on {self._num_ranks} rank(s), "
            f"{self.accelerator.device.type}, {dtype_name(self._dtype)}\n"
            f"result in {args.output_folder()}"
        )

    @property
    def _num_ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def _dtype(self) -> torch.dtype:
        if self.args.dtype != "auto":
            return getattr(torch, self.args.dtype)
        return torch.bfloat16 if self.accelerator.device.type == "cuda" else torch.float32

    def load(self) -> None:
        """Loads and rotates the model, builds the masks, restores an unfinished run."""
        saved, self.saved = self.saved, None
        trained = self._trained_masks()
        configure(self.accelerator, self._dtype, self.args.batch_size)
        with self.reporter.phase("load"):
            model = load_model(
                self.source, self._dtype, self.accelerator.device, self.architecture,
                self.args.load_in,
            )  # fmt: skip
        self.masked = MaskedModel(model, self.architecture)
        distillation = SelfDistillation(self.masked, self.args.gradient_checkpointing)
        attach(self.accelerator, distillation)
        self.perplexity["dense"] = self._heldout(model)
        if self.uses_rotation:
            with self.reporter.phase("rotate"):
                known = trained if saved is None else extra_tensors(saved[1])
                self._rotate(model, known.get("rotation"))
        shapes = initial_shapes(self.architecture, self.args.structures(), self.problem.is_uniform)
        shapes |= {n[3:]: tuple(t.shape) for n, t in trained.items() if n.startswith("mu.")}
        masks = VIBMasks(shapes, INITIAL_LOG_VAR, self.args.seed).to(self.accelerator.device)
        if trained:
            masks.load_state_dict({name: trained[name] for name in masks.state_dict()})
            self.first_step = self.settings.num_steps
        self.objective = MaskObjective(
            distillation, masks, self.problem.cost, self.problem.budget, self.settings
        )
        self.objective.lagrangian.to(self.accelerator.device)
        self.optimizer = make_optimizer(self.objective, self.args.learning_rate)
        if saved is not None:
            self.first_step, tensors = saved
            restore(tensors, self.objective, self.optimizer)
            self.reporter.say(f"resumed after step {self.first_step}")
        if self.accelerator.is_main_process:
            self._open_state_folder(saved is not None)

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
        return trained

    def _open_state_folder(self, is_resumed: bool) -> None:
        """Keeps what the saved state covers, or starts anew; an earlier result is not touched."""
        folder = self.output.path / STATE_FOLDER
        if is_resumed:
            truncate_metrics(folder, self.first_step)
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
        if basis is None:
            windows = self.data.train[:ROTATION_WINDOWS].to(self.accelerator.device)
            batches = list(windows.split(self.args.batch_size))
            basis = principal_basis(model, self.architecture, batches, lambda b: model(b))
        self.basis = basis
        if self.args.load_in == FULL:
            rotate_model(model, self.architecture, basis)
        else:  # first rotated, then quantised
            weights = Weights(self.source, self.architecture, basis, self.args.load_in)
            fill_model(model, weights, self._dtype, self.accelerator.device)

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
        settings = {k: v for k, v in asdict(self.args).items() if k not in FREE_SETTINGS}
        return {
            **settings,
            "global_batch": self.args.global_batch(self._num_ranks),
            "checkpoint": self.source.checkpoint.sha256(),
        }

    def train(self) -> None:
        """Trains the masks from `first_step` to the end."""
        extra = {} if self.basis is None else {"rotation": self.basis}
        if self.args.track:
            settings = {k: str(v) for k, v in asdict(self.args).items()}
            self.accelerator.init_trackers(self.output.path.name, settings)

        def save(step: int) -> None:
            if self.accelerator.is_main_process:
                save_state(
                    self.output.path, step, self.objective, self.optimizer, extra,
                    self._fingerprint,
                )  # fmt: skip

        with self.reporter.phase("train"), self.preemption.deferred():
            num_done = train(
                self.objective,
                self.optimizer,
                self.data.train,
                self.accelerator,
                self.settings,
                self.first_step,
                self._report,
                save,
                self.preemption,
            )
            if num_done == self.settings.num_steps:
                save(num_done)
            self.accelerator.wait_for_everyone()
        if self.preemption.received is not None:
            self.accelerator.end_training()
        self.preemption.check()

    def _report(self, progress: Progress) -> None:
        """Tells of a logged step wherever it is to be told."""
        self.reporter.progress(self.output.path / STATE_FOLDER, progress)
        self.accelerator.log(progress.metrics, step=progress.step)

    def allocate(self) -> None:
        """Picks the kept units and measures the hard-masked model, in both layouts."""
        masks = self.objective.masks
        with self.reporter.phase("allocate"):
            self.plan = allocate(masks, self.problem)
            other = replace(self.problem, is_uniform=not self.problem.is_uniform)
            self.perplexity["masked"] = self._masked_perplexity(self.plan)
            with suppress(UserError):  # the other layout may have no shape within the budget
                self.perplexity["other_layout"] = self._masked_perplexity(allocate(masks, other))

    def _masked_perplexity(self, plan: PrunePlan) -> float:
        device = self.accelerator.device
        hard = {name: gate.to(device) for name, gate in plan.hard().items()}
        self.masked.set_gates(complete_layers(hard, self.architecture))
        perplexity = self._heldout(self.masked.model)
        self.masked.set_gates(None)
        return perplexity

    def _heldout(self, model: Any) -> float:
        return token_perplexity(model, self.data.heldout, self.args.batch_size).value

    def export(self) -> None:
        """Writes the pruned checkpoint and its record on rank zero; other ranks wait."""
        is_main, hashes = self.accelerator.is_main_process, {}
        self.masks = self.objective.masks
        del self.masked, self.objective, self.optimizer
        self.accelerator.free_memory()  # the dense model goes before its successor is loaded
        with self.output if is_main else nullcontext(Path()) as folder:
            if is_main:
                hashes = self._write_weights(folder)
            written = Path(broadcast_object_list([str(folder)])[0])
            if is_main or is_partitioned(self.accelerator):
                self._score(written)
            if is_main:
                self._write_record(folder, hashes)
        if is_main:
            self._remove_state()
        self.accelerator.wait_for_everyone()

    def _write_weights(self, folder: Path) -> dict[str, str]:
        args = self.args
        dtype = None if args.export_dtype == "auto" else getattr(torch, args.export_dtype)
        pruning = Pruning(self.source.checkpoint, self.architecture, self.plan, self.basis, dtype)
        with self.reporter.phase("export"):
            hashes = export_model(
                pruning, self.source.family, self.source.config, self.problem.is_uniform, folder,
                args.shard_bytes(),
            )  # fmt: skip
            write_masks(
                folder,
                self.masks,
                plan_tensors(self.plan, self.basis),
                self.source.checkpoint.sha256(),
            )
        return hashes

    def _score(self, folder: Path) -> None:
        """Measures what was written as a user would load it."""
        with self.reporter.phase("score"):
            pruned = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self._dtype, trust_remote_code=False
            )
            attach(self.accelerator, pruned)
            self.perplexity["pruned"] = self._heldout(pruned.to(self.accelerator.device))

    def _write_record(self, folder: Path, hashes: dict[str, str]) -> None:
        metrics = self.output.path / STATE_FOLDER / METRICS_FILE
        if metrics.is_file():  # there are none where `--masks` took the place of training
            shutil.copyfile(metrics, folder / METRICS_FILE)
        manifest = self._manifest(folder, hashes)
        write_manifest(folder, manifest)
        self.summary = figures(manifest)
        (folder / CARD_FILE).write_text(model_card(manifest, self.summary))

    def _manifest(self, folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
        shape, budget = self.plan.shape, self.problem.budget
        written = Checkpoint.open(folder)
        num_written = sum(torch.Size(info.shape).numel() for info in written.tensors.values())
        num_params = self.problem.cost.of(shape)
        assert num_written == num_params, (num_written, num_params)
        dense_macs = mac_cost(self.source.architecture, self.seq_len)
        return {
            "method": "faster-vtrans",
            "source": {
                "name": self.args.model,
                "revision": self.args.revision,
                "sha256": self.source.checkpoint.sha256(),
            },
            "params": {"before": budget.dense, "after": num_params},
            "macs": {
                "before": dense_macs.of(dense_shape(self.source.architecture)),
                "after": self.macs.of(shape),
                "seq_len": self.seq_len,
            },
            "bytes": {"before": self.source.checkpoint.num_bytes, "after": written.num_bytes},
            "budget": {
                "kind": budget.kind, "dense": budget.dense, "target": budget.target,
                "achieved": num_params,
            },
            "kept": kept_units(shape),
            "layout": self.args.layout,
            "rotation": "pca" if self.basis is not None else "none",
            "perplexity": {
                **self.perplexity,
                "protocol": f"token-level over {len(self.data.heldout)} non-overlapping windows "
                f"of {self.seq_len} tokens held out from {self.args.data}",
            },
            "settings": {**asdict(self.args), "steps": self.settings.num_steps},
            "command": command_line(),
            "phases": self.reporter.record(),
            "versions": versions(),
            "sha256": hashes,
        }  # fmt: skip

    def summarise(self) -> None:
        """Prints the table of dense against pruned and where the result lies."""
        if self.accelerator.is_main_process:
            self.reporter.say(f"\n{self.summary}\n\n{self.args.output_folder()}")
        self.accelerator.end_training()
