"""Before a run: everything that can be checked without weights, and what follows from it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.budget.cost import Cost, mac_cost
from llm_vtrans.budget.problem import Problem, check_reachable
from llm_vtrans.distributed.ranks import join
from llm_vtrans.errors import UserError
from llm_vtrans.families import Architecture
from llm_vtrans.loading.quantised import check_form
from llm_vtrans.loading.source import Source, open_source
from llm_vtrans.preparation.batch_fit import split_step
from llm_vtrans.preparation.planning import (
    compute_dtype,
    dense_params,
    make_problem,
    make_stopwatch,
    rotates,
    task_data,
    training_settings,
    window_length,
)
from llm_vtrans.record.manifest import dtype_name
from llm_vtrans.record.output_folder import OutputFolder
from llm_vtrans.record.recording import METHODS, deciding_settings, result_folder
from llm_vtrans.record.reporting import Reporter
from llm_vtrans.recovery.stage import check_recoverable, check_recovery
from llm_vtrans.recovery.training import default_steps
from llm_vtrans.tasks import Task
from llm_vtrans.timing.stopwatch import Stopwatch
from llm_vtrans.training.loop import TrainingSettings
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.rehearsal import Rehearsal
from llm_vtrans.training.run_state import STATE_FILE, SavedState, read_state
from llm_vtrans.training.tracking import TRACKING_FOLDER, trackers
from llm_vtrans.training.trained_weights import BYTES_PER_PARAMETER, check_trainable


@dataclass
class Prepared:
    """A run whose options, model, data and output folder were checked.

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
        preemption: tells when a signal asks the run to go.
        stopwatch: times networks, where there is a budget of time.
        saved: state of the unfinished run to continue.
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
    preemption: Preemption
    stopwatch: Stopwatch | None = None
    saved: SavedState | None = None

    @classmethod
    def prepare(cls, args: PruneArguments, preemption: Preemption) -> Self:
        """Checks everything that can be checked without loading weights.

        Raises:
            UserError: model, data, budget or output folder cannot be used.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        accelerator = join(
            gradient_accumulation_steps=args.gradient_accumulation,
            log_with=trackers(args),
            project_dir=args.output_folder().parent / TRACKING_FOLDER,
        )
        set_seed(args.seed)
        check_form(args.load_in, accelerator)
        check_trainable(args, accelerator)
        check_recovery(args, accelerator)
        reporter = Reporter(accelerator.is_main_process, args.quiet or args.json)
        output = result_folder(args)
        with accelerator.main_process_first():
            output.check()
        source = open_source(args.model, args.revision)
        check_recoverable(args, source)
        seq_len = window_length(args, source)
        is_given = bool(args.batch_size)
        args = args.filled(seq_len, accelerator.num_processes)
        if not is_given:
            args = split_step(args, source, seq_len, accelerator)
        stopwatch = make_stopwatch(args, source, accelerator.device)
        with reporter.phase("timing") if stopwatch else nullcontext():
            problem = make_problem(args, source, accelerator.device, stopwatch)
        check_reachable(problem, frozenset(args.structures()))
        trained = BYTES_PER_PARAMETER * dense_params(source) if args.trains_weights else 0
        output.require_space(2 * source.checkpoint.num_bytes + trained)
        with reporter.phase("calibration"):
            data = task_data(args, source, seq_len)
        settings = training_settings(args, accelerator.num_processes)
        job = cls(
            args, accelerator, reporter, source, problem.architecture, problem, settings, data,
            output, preemption, stopwatch,
        )  # fmt: skip
        job.saved = job._saved_state()
        if job.saved is not None:
            reporter.take_up(job.saved.phases)
        reporter.num_steps = settings.num_steps + job.recovery_steps
        return job

    @property
    def seq_len(self) -> int:
        """Tokens in a calibration window; MACs are stated for this length."""
        return window_length(self.args, self.source)

    def rehearsal(self) -> Rehearsal | None:
        """Of tuning, where that leaves the weights alone: what was trained is forgotten again."""
        if self.args.trains_weights or not self.settings.tune_steps:
            return None
        return Rehearsal(
            self.data.train, self.accelerator, self.settings, self.preemption, self.reporter.say
        )

    @property
    def uses_rotation(self) -> bool:
        """Whether the residual stream is rotated before masks are trained."""
        return rotates(self.args, self.source)

    @property
    def recovery_steps(self) -> int:
        """Steps that train the exported network."""
        if self.args.recover not in ("lora", "full"):
            return 0
        return self.args.recover_steps or default_steps(self.global_batch, self.seq_len)

    @cached_property
    def macs(self) -> Cost:
        """Multiply-accumulates for one sequence."""
        return mac_cost(self.architecture, self.seq_len)

    def show_plan(self) -> None:
        """Prints what is going to happen."""
        args = self.args
        aims = " and ".join(
            f"from {limit.budget.text(limit.budget.dense)} to at most "
            f"{limit.budget.text(limit.budget.allowed)} "
            f"({100 * (1 - limit.budget.allowed / limit.budget.dense):.1f}% less)"
            for limit in self.problem.limits
        )
        self.reporter.say(
            f"{args.model}: {self.source.config.model_type}, {aims}\n"
            f"prune {', '.join(args.structures())}; layout {args.layout}; rotation "
            f"{'pca' if self.uses_rotation else 'none'}; dimensions in multiples of "
            f"{self.problem.round_to}\n"
            f"{METHODS[args.variant]}: {self.settings.num_steps} steps of "
            f"{self.global_batch} x {self.seq_len} tokens of {args.data} on "
            f"{self.num_ranks} rank(s), {self.accelerator.device.type}, "
            f"{dtype_name(self.dtype)}{self._recovery_line}\nresult in {args.output_folder()}"
        )
        if args.json and args.dry_run and self.accelerator.is_main_process:
            plan = {"output": str(args.output_folder()), "budget": asdict(self.problem.budget),
                    "layout": args.layout, "steps": self.settings.num_steps}  # fmt: skip
            print(json.dumps(plan))

    @property
    def _recovery_line(self) -> str:
        steps = f" for {self.recovery_steps} steps" if self.recovery_steps else ""
        return f"\nrecover by {self.args.recover}{steps}" if self.args.recovers else ""

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def global_batch(self) -> int:
        """Sequences in an optimizer step, over all ranks."""
        return self.args.global_batch(self.num_ranks)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return compute_dtype(self.args.dtype, self.accelerator.device)

    def _saved_state(self) -> SavedState | None:
        """The unfinished run in the output folder, if it is to be continued."""
        folder = self.output.path
        exists = (folder / STATE_FILE).is_file()
        if exists and not (self.args.resume or self.args.overwrite):
            raise UserError(
                f"{folder} holds an unfinished run: --resume continues it, --overwrite starts anew"
            )
        return read_state(folder, self.fingerprint) if self.args.resume else None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a resumed run must share; ranks may differ if the global batch does not."""
        return {
            **deciding_settings(self.args),
            "global_batch": self.global_batch,
            "checkpoint": self.source.checkpoint.sha256,
        }
