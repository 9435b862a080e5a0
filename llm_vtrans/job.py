"""One pruning run: the stages in order, each leaving what the next one needs."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_vtrans.allocation.allocate import PrunePlan, allocate
from llm_vtrans.allocation.choosing import Chooser, hard_gates
from llm_vtrans.basis.head_basis import HeadBasis, balanced_basis
from llm_vtrans.basis.oblique import AnyBasis, oblique_basis
from llm_vtrans.basis.rotation import principal_basis, rotate_model
from llm_vtrans.calibration.own_words import own_windows, with_windows
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import attach, configure, is_partitioned
from llm_vtrans.errors import UserError, blame
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.export.result import write_result
from llm_vtrans.families import Shape
from llm_vtrans.loading.model import Weights, fill_model, final_norm, load_model
from llm_vtrans.loading.quantised import FULL
from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.by_layer import KEPT_HIDDEN
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.preparation.batch_fit import has_room
from llm_vtrans.preparation.prepared import Prepared
from llm_vtrans.preparation.reuse import reused_masks
from llm_vtrans.record.manifest import dtype_name, figures
from llm_vtrans.record.masks_file import plan_tensors, saved_plan
from llm_vtrans.record.recording import result_line
from llm_vtrans.scoring.measuring import Measurements
from llm_vtrans.tasks.encoding import Batch, Examples, inputs_of
from llm_vtrans.timing.timed_choice import choose_in_time, corrected
from llm_vtrans.training.dense_teacher import DenseTeacher
from llm_vtrans.training.distillation import Distillation, SelfDistillation
from llm_vtrans.training.loop import Objective, Progress, tokens_per_step, train
from llm_vtrans.training.run_state import STATE_FILE, STATE_FOLDER, open_state, restore, save_state
from llm_vtrans.training.search import INITIAL_LOG_VAR, SearchObjective, initial_shapes
from llm_vtrans.training.shrinking import Shrinker
from llm_vtrans.training.smaller import narrow
from llm_vtrans.training.trained_weights import train_weights
from llm_vtrans.training.tune import TuneObjective

SCORE, UNTUNED = "score.", "untuned"  # a prefix of tensors on disk, and one of them
ROTATION_WINDOWS = 128  # enough tokens for a second moment of any usual hidden size
CHOICE_EXAMPLES = 8  # plans differ by far more than the noise of as many texts
CHOICE_ROWS = 32  # of labelled data, which has one answer in a row


@dataclass
class Job(Prepared):
    """A run between its stages; `prepare` makes it, the other methods are called in order.

    Attributes:
        measured: scores and times of the networks that the run had and made.
        rotation: of the residual stream, if it is rotated.
        head_basis: of the heads, where not all of their dimensions are kept.
        untuned: what the plan loses before anything is trained for it, in nats.
        choice: on which plans are compared; None for training examples. Masks are fitted to the
            calibration text, a model's own words tell what else a plan loses.
    """

    rotation: Tensor | None = None
    head_basis: HeadBasis | None = None
    choice: Examples | None = None
    untuned: float = 0.0

    # Filled by `load` and `allocate`.
    masked: MaskedModel = field(init=False)
    distillation: Distillation = field(init=False)
    masks: VIBMasks = field(init=False)
    tuning: Tuning = field(init=False)
    is_searched: bool = field(init=False)
    plan: PrunePlan = field(init=False)
    measured: Measurements = field(init=False)
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.measured = Measurements(
            self.data, self.accelerator, self.args.batch_size,
            self.dtype if self.is_whole else None, self.stopwatch,
        )  # fmt: skip

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds the weights unsliced and in full precision."""
        return self.args.load_in == FULL and not is_partitioned(self.accelerator)

    @property
    def is_fitted(self) -> bool:
        """Whether tuning begins in closed form: weights that are trained need none."""
        return not self.args.trains_weights

    def load(self) -> None:
        """Loads and rotates the model, hooks tuning and masks onto it."""
        known = self._known()
        device = self.accelerator.device
        configure(self.accelerator, self.dtype, self.args.batch_size)
        with self.reporter.phase("load"):
            dtype = torch.float32 if self.args.trains_weights else self.dtype
            model = load_model(self.source, dtype, device, self.architecture, self.args.load_in)
        self.measured.time("dense", model)  # before anything is hooked onto it
        if not self.args.trains_weights:
            self._connect(model)
        self._check_overflow(model)
        self.measured.score("dense", model)
        if self.data.kind == "clm" and self.args.own_words:
            with self.reporter.phase("own words"):
                self._write_own_words(model)
        if self.architecture.couples_heads:
            with self.reporter.phase("heads"):
                self.head_basis = balanced_basis(
                    model,
                    self.architecture,
                    self._first_batches(ROTATION_WINDOWS),
                    lambda b: model(**b),
                )
                self.problem = replace(self.problem, head_retention=self.head_basis.retained)
        if self.uses_rotation:
            with self.reporter.phase("rotate"):
                self._rotate(model, known.get("rotation"))
        if self.args.trains_weights:
            self._connect(model, teacher=copy.deepcopy(model))
        shapes = initial_shapes(self.architecture, self.args.structures(), self.problem.is_uniform)
        shapes |= {n[3:]: tuple(t.shape) for n, t in known.items() if n.startswith("mu.")}
        self.masks = VIBMasks(shapes, INITIAL_LOG_VAR, self.args.seed).to(device)
        self.is_searched = any(name.startswith("mu.") for name in known)
        if self.is_searched:
            self.masks.load_state_dict({name: known[name] for name in self.masks.state_dict()})
        if self.accelerator.is_main_process:
            open_state(self.output.path, self.saved.step if self.saved else None)
        if self.args.track:
            settings = {name: str(value) for name, value in asdict(self.args).items()}
            self.accelerator.init_trackers(self.output.path.name, settings)

    def _write_own_words(self, model: PreTrainedModel) -> None:
        """Mixes the model's own texts into those that are still to be trained on."""
        args, train = self.args, self.data.train
        first = 0 if args.masks is None else self.settings.search_steps * self.global_batch
        num = round(args.own_words * max(0, len(train) - first))
        own = own_windows(model, CHOICE_EXAMPLES + num, train, self.accelerator, args.seed)
        chosen, mixed = own.split([CHOICE_EXAMPLES, num])
        self.data = replace(self.data, train=with_windows(train, mixed, first, args.seed))
        self.choice = Examples({"input_ids": chosen})

    @torch.no_grad()
    def _check_overflow(self, model: PreTrainedModel) -> None:
        """Finds out before anything is learnt from them that the outputs are no numbers."""
        if not torch.isfinite(logits_of(model(**self._first_batches(1)[0]))).all():
            raise UserError(
                f"{self.args.model}: computed in {dtype_name(self.dtype)}, the dense model's "
                "outputs are NaN or infinite; give another --dtype"
            )

    def _connect(self, model: PreTrainedModel, teacher: nn.Module | None = None) -> None:
        """Hooks gates and tuning onto the model; its teacher is itself if weights stay frozen."""
        args, device = self.args, self.accelerator.device
        self.tuning = Tuning(self.architecture, self.uses_rotation).to(device)
        self.masked = MaskedModel(model, self.architecture, self.tuning)
        if teacher is None:
            self.distillation = SelfDistillation(self.masked, args.gradient_checkpointing)
            attach(self.accelerator, self.distillation)
            return
        train_weights(model, self.architecture, self.uses_rotation)
        self.distillation = DenseTeacher(
            self.masked, teacher.to(self.dtype), args.weight_learning_rate, args.temperature,
            self.dtype, args.gradient_checkpointing,
        ).to(device)  # fmt: skip

    def _known(self) -> dict[str, Tensor]:
        """What was trained before: by the unfinished run, or by the one that `--masks` names."""
        if self.saved is not None:
            return self.saved.extra
        checkpoint = self.source.checkpoint.sha256
        return reused_masks(self.args, self.architecture, self.uses_rotation, checkpoint)

    def _rotate(self, model: PreTrainedModel, basis: Tensor | None) -> None:
        if basis is None:
            basis = principal_basis(
                model,
                self.architecture,
                self._first_batches(ROTATION_WINDOWS),
                lambda b: model(**b),
            )
        self.rotation = basis
        if self.architecture.tied_head is not None:
            self.tuning.tie(final_norm(self.source.checkpoint, self.architecture, basis))
        if self.args.load_in == FULL:
            rotate_model(model, self.architecture, basis)
        else:  # first rotated, then quantised
            weights = Weights(self.source, self.architecture, basis, self.args.load_in)
            fill_model(model, weights, self.dtype, self.accelerator.device)

    def _first_batches(self, num: int, examples: Examples | None = None) -> list[Batch]:
        """Inputs from the first examples, by default those of training, the same on every rank."""
        examples = examples or self.data.train
        first = examples.take(torch.arange(min(num, len(examples))))
        batches = first.batches(self.args.batch_size, self.accelerator.device)
        return [inputs_of(batch) for batch in batches]

    def search(self) -> None:
        """Trains the masks, unless an earlier run did."""
        if self.is_searched:
            return
        shrinker = None
        if self.args.shrink_every:
            shrinker = Shrinker(
                self.masked, self.source, self.problem, self.args.shrink_every,
                self.args.gradient_checkpointing,
            )  # fmt: skip
            shrinker.recall(self.saved.extra if self.saved else {})
        objective = SearchObjective(
            self.distillation, self.masks, self.problem.limits, self.settings, shrinker
        )
        with self.reporter.phase("search"):
            self._train(objective, self.rotation_record())
            if shrinker is not None:
                shrinker.expand()
        trained = {name: tensor.cpu() for name, tensor in self.masks.state_dict().items()}
        self.masks.load_state_dict(agreed(trained))  # plans follow from the last digit

    def allocate(self) -> None:
        """Picks the kept units and measures the hard-masked model, in both layouts."""
        with self.reporter.phase("allocate"):
            if self.saved is not None:
                with blame(self.output.path / STATE_FILE, "start with --overwrite"):
                    self._recall(self.saved.extra)
                if self.stopwatch is not None:
                    self.problem = corrected(self.problem, self.plan.shape, self._nanoseconds)
                return
            oblique = None
            if self.uses_rotation:
                batches = self._first_batches(ROTATION_WINDOWS)
                oblique = oblique_basis(self.masked, self.architecture, batches, self.args.seed)
            chooser = self.chooser(oblique)

            def measure(plan: PrunePlan, name: str) -> None:
                chooser.use(plan)
                self.measured.stage(name, self.masked.model)

            other = replace(self.problem, is_uniform=not self.problem.is_uniform)
            with suppress(UserError):  # the other layout may have no shape within the budget
                measure(chooser.choose(other), "other_layout")
            choose = partial(chooser.choose, rehearsal=self.rehearsal())
            if self.stopwatch is None:
                self.plan = choose(self.problem)
            else:
                self.plan, self.problem = choose_in_time(
                    self.problem, partial(allocate, self.masks), choose,
                    chooser.refit, self._nanoseconds, self.reporter.say,
                )  # fmt: skip
            self.untuned = chooser.loss(self.plan)
            measure(self.plan, "hardened")
            self.masked.set_gates(None)

    def _nanoseconds(self, shape: Shape) -> float:
        """What a network of this shape takes in the run's layout, where time is a budget."""
        assert self.stopwatch is not None
        return self.stopwatch.nanoseconds(shape, self.problem.is_uniform)

    def chooser(self, oblique: AnyBasis | None = None) -> Chooser:
        """Compares plans by what they lose on examples of the run."""
        num = CHOICE_EXAMPLES if self.masked.predicts_tokens else CHOICE_ROWS
        examples = self._first_batches(num, self.choice)
        return Chooser(self.distillation, self.masks, examples, oblique, self.head_basis)

    def _found(self) -> dict[str, Tensor]:
        """What a run that is resumed in the last stage must know of those before.

        The network has changed by then, so it can neither choose nor measure again.
        """
        headline = {SCORE + n: x for n, x in self.measured.headline.items()}
        numbers = {UNTUNED: self.untuned, **headline}
        scores = {n: torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()}
        return {**self.masks.state_dict(), **plan_tensors(self.plan), **scores}

    def _recall(self, found: dict[str, Tensor]) -> None:
        """Takes plan and scores from a saved state."""
        self.plan = replace(saved_plan(found), basis=self.head_basis)
        self.untuned = found[UNTUNED].item()
        self.measured.headline = {
            n[len(SCORE) :]: x.item() for n, x in found.items() if n.startswith(SCORE)
        }

    def tune(self) -> None:
        """Trains the network for the units that stay."""
        if not self.settings.tune_steps:
            return
        sparsity = self.problem.sparsity(self.plan.shape)
        gates = hard_gates(self.plan, self.accelerator.device)
        with self.reporter.phase("tune"):
            if self.saved is None and self.is_fitted:
                batches = self._first_batches(ROTATION_WINDOWS)
                self.untuned = self.chooser().fitted(self.plan, batches)
            if self._narrows():
                narrow(self.masked, self.source, self.plan, self.args.gradient_checkpointing)
            self.tuning.settle(gates.get(KEPT_HIDDEN))
            num_tokens = tokens_per_step(self.settings, self.accelerator, self.data.train)
            objective = TuneObjective(
                self.distillation, gates, self.untuned, num_tokens, sparsity, self.settings
            )
            self._train(objective, {**self.rotation_record(), **self._found()})
            self.masked.set_gates(gates)
            self.measured.stage("tuned", self.masked.model)
            self.masked.set_gates(None)

    def _narrows(self) -> bool:
        """Whether a network that is cut down is tuned, with the whole one for its teacher."""
        if self.args.trains_weights or not self.is_whole:
            return False
        return has_room(self.args, self.source, self.seq_len, self.accelerator)

    def rotation_record(self) -> dict[str, Tensor]:
        """The rotation by its name on disk, if there is one."""
        return {} if self.rotation is None else {"rotation": self.rotation}

    def _train(self, objective: Objective, record: dict[str, Tensor]) -> None:
        """Runs a stage from its beginning, or from the saved state."""
        optimizer = objective.optimizer()
        first_step = objective.stage.start
        if self.saved is not None:
            first_step, tensors = self.saved.step, self.saved.tensors
            self.saved = None
            with blame(self.output.path / STATE_FILE, "start with --overwrite"):
                restore(tensors, objective, optimizer)
            self.reporter.say(f"resumed after step {first_step}")

        def save(step: int) -> None:
            if self.accelerator.is_main_process:
                extra = {**record, **objective.record()}
                save_state(
                    self.output.path, step, objective, optimizer, extra, self.fingerprint,
                    self.reporter.record(),
                )  # fmt: skip

        with self.preemption.deferred(self.accelerator):
            train(
                objective,
                optimizer,
                self.data.train,
                self.accelerator,
                self.settings,
                first_step,
                self.report,
                save,
                self.preemption,
            )
        if self.preemption.received is not None:
            self.accelerator.end_training()
        self.preemption.check()

    def report(self, progress: Progress) -> None:
        """Tells of a logged step wherever it is to be told."""
        self.reporter.progress(self.output.path / STATE_FOLDER, progress)
        self.accelerator.log(progress.metrics, step=progress.step)

    def pruning(self) -> Pruning:
        """The plan, with what was tuned for it, bound to the dense weights."""
        basis, factors = self.tuning.basis(self.rotation), self.tuning.factors()
        return Pruning(self.source.checkpoint, self.architecture, self.plan, basis, scales=factors)

    def export(self) -> None:
        """Writes the pruned checkpoint and its record; the job's own network is gone then."""
        write_result(self)

    def score(self, folder: Path, name: str) -> None:
        """Measures what was written as a user would load it, on rank zero unless all hold it."""
        if not (self.accelerator.is_main_process or is_partitioned(self.accelerator)):
            return
        with self.reporter.phase("score"):
            written = self.source.auto_class.from_pretrained(
                folder, dtype=self.dtype, trust_remote_code=False
            )
            attach(self.accelerator, written)
            written.to(self.accelerator.device)
            self.measured.score(name, written)
            if name == "pruned":
                self.measured.time(name, written)

    def summarise(self) -> None:
        """Prints the table of dense against pruned and where the result lies."""
        if self.accelerator.is_main_process:
            folder = self.args.output_folder()
            self.reporter.say(f"\n{figures(self.manifest)}\n\n{folder}")
            if self.args.json:
                print(result_line(folder, self.manifest))
