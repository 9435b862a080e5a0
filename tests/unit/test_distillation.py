"""Chunked loss and recomputation give what the plain computation gives."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from llm_vtrans.basis.rotation import rotated_architecture
from llm_vtrans.families import family_for
from llm_vtrans.families.base import Axis, Place, head_of
from llm_vtrans.masking.attachment import LINEAR_HEADS, MaskedModel
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.distillation_loss import chunked_distillation, distillation_loss
from tests.tiny import CONFIGS, VOCAB_SIZE, tiny_model
from tests.unit.test_exactness import inputs_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 11)])
def test_loss_is_the_divergence(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    if len(shape) == 1:
        student, teacher = student[None], teacher[None]
    student.requires_grad_()
    kept = student.detach().clone(), teacher.clone()
    found = distillation_loss(student, teacher)
    rows = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    log_student, log_teacher = (row.log_softmax(-1) for row in rows)
    expected = kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(5 * loss, student)[0] for loss in (found, expected)]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(*grads)
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])


@pytest.mark.parametrize("chunk_logits", [1, 3 * VOCAB_SIZE, 10**6])
@pytest.mark.parametrize("trains_head", [False, True])
def test_chunks_change_nothing(chunk_logits: int, trains_head: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, VOCAB_SIZE, bias=True).double().requires_grad_(trains_head)
    student = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = [student, *(head.parameters() if trains_head else ())]
    target = head(teacher).detach()
    expected = distillation_loss(head(student), target)
    found = chunked_distillation(head, student, teacher, chunk_logits)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad and found > 0.1
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_distillation(head, student, teacher, chunk_logits), expected
        )
    for one, other in zip(
        torch.autograd.grad(3 * found, inputs),
        torch.autograd.grad(3 * expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_that_of_the_logits(name: str) -> None:
    """In chunks where the head is one matrix; what a model does after it is not missed."""
    model = tiny_model(name)
    architecture = family_for(model.config.model_type).describe(model.config)
    masked = MaskedModel(model, architecture)
    assert (masked.head is None) == (head_of(model.config) not in LINEAR_HEADS)
    inputs = inputs_for(model.config, 0)
    gates = {"ffn": torch.linspace(0.2, 1.5, 20).repeat(3, 1).requires_grad_()}
    dense = masked(inputs).detach()
    masked.set_gates(gates)
    expected = distillation_loss(masked(inputs), dense)
    terms = SelfDistillation(masked)(inputs, gates)
    found = terms["distillation"]
    assert ("hidden" in terms) == (not masked.predicts_tokens)
    assert expected > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    grads = [torch.autograd.grad(loss, gates["ffn"])[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_other_heads_follow_the_stream() -> None:
    """One answer for a whole sequence says little of what is lost inside; padding plays no part."""
    model = tiny_model("bert-classify")
    masked = MaskedModel(model, family_for("bert").describe(model.config))
    inputs = {**inputs_for(model.config, 0), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    inputs["attention_mask"][:, 12:] = 0
    distillation = SelfDistillation(masked)
    taught = distillation.teach(inputs)
    gates = {"ffn": torch.full((3, 20), 0.5)}
    masked.set_gates(gates)
    output = model(**inputs, output_hidden_states=True)
    expected = [
        ((s - t).square().sum(-1) / t.square().sum(-1))[:, :12].mean()
        for s, t in zip(output.hidden_states[3:0:-1], taught.layers, strict=True)
    ]
    terms = distillation({**inputs, "labels": torch.zeros(2, dtype=torch.long)}, gates)
    torch.testing.assert_close(terms["hidden"], torch.stack(expected).mean())
    torch.testing.assert_close(terms["loss"], terms["hidden"] + terms["distillation"])
    assert float(distillation.loss(inputs, taught)) == pytest.approx(float(terms["loss"]))


def test_plans_are_compared_by_what_all_of_them_have() -> None:
    """Those in another basis of the stream have no layers to match; the others' do not count."""
    model = tiny_model("llama-classify")
    architecture = rotated_architecture(family_for("llama").describe(model.config))
    masked = MaskedModel(model, architecture, Tuning(architecture, is_rotated=True))
    inputs = inputs_for(model.config, 0)
    distillation = SelfDistillation(masked)
    taught = distillation.teach(inputs)
    losses = []
    for maps in (None, {place: torch.eye(architecture.num_units[Axis.HIDDEN]) for place in Place}):
        masked.tuning.start(maps)
        masked.set_gates({"ffn": torch.full((3, 20), 0.5)})
        losses.append(float(distillation.loss(inputs, taught)))
    assert losses[0] > 1e-6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_head_that_rescales_is_not_taken_for_a_matrix() -> None:
    model = tiny_model("llama")
    masked = MaskedModel(model, family_for("llama").describe(model.config))
    assert masked.head is model.get_output_embeddings()
    model.config.final_logit_softcapping = 30.0
    assert masked.head is None


def test_recomputation_sees_the_same_gates() -> None:
    grads, peaks = [], []
    for recomputes in (False, True):
        model = tiny_model("llama")
        masked = MaskedModel(model, family_for("llama").describe(model.config))
        distillation = SelfDistillation(masked, recomputes)
        gate = torch.linspace(0.5, 1.5, 20).repeat(3, 1).requires_grad_()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
        ):
            terms = distillation({"input_ids": torch.arange(32).view(2, 16)}, {"ffn": gate})
        terms["loss"].backward()
        grads.append(gate.grad)
        peaks.append(sum(saved))
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0] is not None and grads[0].abs().min() > 0
    assert peaks[1] < peaks[0] / 2
