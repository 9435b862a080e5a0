"""Distillation from a second model: its terms, its layer matching, and subsets of the data."""

import copy
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_vtrans.budget.cost import complete
from llm_vtrans.calibration.text import TextSource, calibrate
from llm_vtrans.families import family_for
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.tasks import training_order
from llm_vtrans.tasks.encoding import Batch
from llm_vtrans.training.dense_teacher import DenseTeacher, softened_loss
from llm_vtrans.training.search import target_at
from llm_vtrans.training.trained_weights import train_weights
from tests.tiny import CONFIGS, VOCAB_SIZE, tiny_model


def make(name: str) -> DenseTeacher:
    model = tiny_model(name)
    architecture = family_for(CONFIGS[name].model_type).describe(CONFIGS[name])
    teacher = copy.deepcopy(model)
    masked = MaskedModel(model, architecture)
    train_weights(model, architecture, is_rotated=False)
    return DenseTeacher(masked, teacher, 1e-3, 2.0, torch.float32)


def batch(name: str) -> Batch:
    draw = torch.Generator().manual_seed(0)
    found = {"input_ids": torch.randint(1, VOCAB_SIZE, (2, 9), generator=draw)}
    if name.endswith("classify"):
        found["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [5]])).long()
        found["labels"] = torch.tensor([0, 2])
    return found


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "bert-classify", "roberta-classify"])
def test_the_unmasked_student_is_its_teacher(name: str) -> None:
    """Distance zero at first; every weight has a gradient as soon as a gate acts."""
    distillation = make(name)
    gates = complete({"layers": torch.ones(1, 1)}, distillation.masked.architecture)
    terms = distillation(batch(name), gates)
    assert float(terms["distillation"].detach().abs()) < 1e-5
    assert float(terms["hidden"].detach()) < 1e-8
    assert ("task" in terms) == name.endswith("classify")
    if "task" in terms:
        logits = distillation.teacher(**batch(name)).logits
        expected = torch.nn.functional.cross_entropy(logits, batch(name)["labels"])
        torch.testing.assert_close(terms["task"], expected)
    gates = {**gates, "hidden": 0.5 * gates["hidden"]}
    terms = distillation(batch(name), gates)
    terms["loss"].backward()
    for group in distillation.parameter_groups():
        assert all(p.grad is not None for p in group["params"])
    assert not any(p.requires_grad for p in distillation.teacher.parameters())
    assert distillation.map.grad is not None and bool(distillation.map.grad.any())


def test_each_teacher_layer_takes_the_nearest() -> None:
    distillation = make("llama")
    layers = [torch.randn(2, 5, 24) for _ in range(3)]
    reversed_ = [layer + 1e-4 for layer in layers[::-1]]
    near = distillation.hidden_loss(reversed_, layers, None)
    assert float(near.detach()) < 1e-6
    far = distillation.hidden_loss(layers[:1], layers[1:], None)
    expected = sum(
        float(((layers[0] - t).square().sum(-1) / t.square().sum(-1)).mean()) for t in layers[1:]
    )
    assert float(far.detach()) == pytest.approx(expected / 2, rel=1e-5)


def test_padding_does_not_count() -> None:
    distillation = make("llama")
    teacher = torch.randn(2, 5, 24)
    is_token = torch.ones(2, 5)
    is_token[1, 2:] = 0
    student = torch.where(is_token[..., None] > 0, teacher, torch.randn(2, 5, 24))
    assert float(distillation.hidden_loss([student], [teacher], is_token).detach()) == 0
    assert float(distillation.hidden_loss([student], [teacher], None).detach()) > 0


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """Towards high temperatures the loss tends to half the squared distance over the classes."""
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    centred = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    limit = centred.square().mean(-1).mean() / 2
    torch.testing.assert_close(softened_loss(student, teacher, 50.0), limit, rtol=5e-2, atol=0)
    number = softened_loss(student[:, :1], teacher[:, :1], 7.0)
    torch.testing.assert_close(number, (student - teacher)[:, 0].square().mean() / 2)


def test_a_fraction_is_a_subset_by_seed() -> None:
    first, again = (training_order(1000, 3000, 0.03, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) == 90 and len(first.unique()) == 30  # three passes, as over the whole
    assert torch.equal(first.bincount().unique(), torch.tensor([0, 3]))
    assert set(training_order(1000, 3000, 0.03, seed=6).tolist()) != set(first.tolist())
    assert sorted(training_order(1000, None, 1.0, seed=5).tolist()) == list(range(1000))


def test_a_fraction_of_text_is_part_of_the_whole(tmp_path: Path) -> None:
    draw = random.Random(0)
    vocab = {chr(33 + i): i for i in range(VOCAB_SIZE - 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    paragraphs = ("".join(draw.choices(list(vocab), k=100)) for _ in range(200))
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    source = TextSource(str(tmp_path / "text.txt"))
    whole = calibrate(source, fast, 400, 16, 3)
    part, again = (calibrate(source, fast, 400, 16, 3, 0.1) for _ in range(2))
    assert torch.equal(part.train, again.train) and len(part.train) == 40
    assert {*map(tuple, part.train.tolist())} <= {*map(tuple, whole.train.tolist())}
    assert torch.equal(part.heldout, whole.heldout)
    assert not torch.equal(part.train, calibrate(source, fast, 400, 16, 4, 0.1).train)


def test_schedules_rise_to_the_budget() -> None:
    for schedule, share in (("linear", 0.1), ("cubic", 0.5)):
        targets = [target_at(step, 100, 0.02, 0.5, schedule) for step in range(100)]
        assert targets[0] == pytest.approx(0.02) and targets == sorted(targets)
        reached = next(i for i, t in enumerate(targets) if t == pytest.approx(0.5))
        assert reached == 100 * share
    quarter = target_at(25, 100, 0.0, 0.5, "cubic")
    assert quarter == pytest.approx(0.5 * (1 - 0.5**3))
