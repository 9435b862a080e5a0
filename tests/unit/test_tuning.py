"""Maps and factors: where they act, what they start as, and that training them helps."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from llm_vtrans.budget.cost import complete
from llm_vtrans.families import Architecture, Axis, family_for
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.by_layer import KEPT_HIDDEN
from llm_vtrans.masking.gating import map_read, map_written
from llm_vtrans.masking.tuning import MAP_LEARNING_RATE, Tuning, num_maps
from llm_vtrans.tasks.encoding import Examples
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.loop import TrainingSettings, train
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.tune import TuneObjective
from tests.tiny import CONFIGS, VOCAB_SIZE, tiny_model

LANGUAGE_MODELS = ["llama", "llama-tied", "llama-bias", "qwen3", "gemma", "gpt2", "bert-mlm"]


def architecture_of(name: str) -> Architecture:
    return family_for(CONFIGS[name].model_type).describe(CONFIGS[name])


def fresh(name: str) -> Tuning:
    """Untrained, with maps where the family allows a change of basis."""
    return Tuning(architecture_of(name), architecture_of(name).rotates)


def halved(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Gates without every second hidden dimension and FFN unit."""
    gates = complete({"layers": torch.ones(1, 1)}, architecture)
    gates = {name: gate.clone() for name, gate in gates.items()}
    gates[Axis.HIDDEN][::2] = 0
    gates[Axis.FFN][:, ::2] = 0
    return gates


def tokens(num: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (num, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_fresh_tuning_is_the_identity(name: str) -> None:
    architecture = architecture_of(name)
    gates = halved(architecture)
    plain = MaskedModel(tiny_model(name), architecture)
    tuned = MaskedModel(tiny_model(name), architecture, fresh(name))
    tuned.tuning.is_on = True
    for masked in (plain, tuned):
        masked.set_gates(gates)
    with torch.no_grad():
        torch.testing.assert_close(tuned(tokens(2)), plain(tokens(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_factor_and_map_acts(name: str) -> None:
    """Each has a gradient, and none acts while the gates are off."""
    architecture = architecture_of(name)
    tuning = fresh(name)
    model = tiny_model(name)
    with torch.no_grad():
        dense = model(tokens(2)).logits
        for parameter in tuning.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    masked = MaskedModel(model, architecture, tuning)
    assert masked(tokens(2)).equal(dense)
    tuning.is_on = True
    masked.set_gates(complete({"layers": torch.ones(1, 1)}, architecture))
    masked(tokens(2)).square().sum().backward()
    for key, parameter in tuning.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_tuning_brings_the_pruned_network_nearer(name: str) -> None:
    """The stage's own loop lowers the distillation loss on windows that it does not see."""
    architecture = architecture_of(name)
    masked = MaskedModel(tiny_model(name), architecture, fresh(name))
    settings = TrainingSettings(0, 60, 8, 1, 0.1, 0.0, 0, 100, 100, True)
    hard = halved(architecture)
    objective = TuneObjective(SelfDistillation(masked), hard, 0.1, 8 * 16, 0.5, settings)
    unseen = {"input_ids": tokens(520)[480:]}

    def loss() -> float:
        with torch.no_grad():
            return float(objective(unseen, 0, 0)["loss"])

    before = loss()
    saved: list[int] = []
    train(
        objective,
        objective.optimizer(),
        Examples({"input_ids": tokens(520)[:480]}),
        Accelerator(cpu=True),
        settings,
        0,
        lambda progress: None,
        saved.append,
        Preemption(),
    )
    assert saved == [60]
    assert loss() < 0.9 * before


@pytest.mark.parametrize(("loss", "distance"), [(0.04, 0.2), (0.0, 0.0), (-1e-9, 0.0), (9.0, 1.0)])
def test_steps_are_as_long_as_the_way(loss: float, distance: float) -> None:
    """Rates follow the root of the loss, and stop growing at one nat."""
    tuning = fresh("llama")
    rates = [group["peak"] for group in tuning.parameter_groups(loss, 64)]
    longest = [group["peak"] for group in tuning.parameter_groups(1.0, 64)]
    assert rates == pytest.approx([distance * rate for rate in longest])
    assert all(rate > 0 for rate in longest)


def test_steps_of_maps_are_short_where_few_tokens_say_where_to() -> None:
    """As the root of the tokens of a step at first; however many, they stay below a limit."""
    tuning = fresh("llama")

    def rates(num_tokens: int) -> list[float]:
        return [group["peak"] for group in tuning.parameter_groups(1.0, num_tokens)]

    *maps, factors = zip(rates(1), rates(4), rates(10**6), rates(10**9), strict=True)
    assert len(maps) == 4 and len(set(maps)) == 1  # embeddings, what writes, what reads, head
    assert maps[0][1] == pytest.approx(2 * maps[0][0], rel=0.02)
    assert maps[0][3] == pytest.approx(maps[0][2], rel=0.001)
    assert maps[0][2] < MAP_LEARNING_RATE
    assert len(set(factors)) == 1


@pytest.mark.parametrize(
    ("share", "numbers", "num"), [(0.0, 0, 4), (10.0, 0, 2 + 2 * 6), (0.0, 2**26, 2 + 2 * 6)]
)
def test_sublayers_share_maps_as_far_as_they_must(
    monkeypatch: pytest.MonkeyPatch, share: float, numbers: int, num: int
) -> None:
    """One pair for all sub-layers at least, one each at most; embeddings and head have theirs."""
    monkeypatch.setattr("llm_vtrans.masking.tuning.MAP_SHARE", share)
    monkeypatch.setattr("llm_vtrans.masking.tuning.MAP_NUMBERS", numbers)
    assert CONFIGS["llama"].num_hidden_layers == 3
    assert len(fresh("llama").maps) == num_maps(architecture_of("llama")) == num
    assert len(fresh("llama-tied").maps) == num_maps(architecture_of("llama-tied")) == num - 1
    assert len(fresh("gpt2").maps) == num - 1  # one table
    assert len(fresh("gpt2-untied").maps) == num
    for name in ("bert-mlm", "bert-classify"):
        assert len(fresh(name).maps) == num_maps(architecture_of(name)) == num


@given(st.integers(2, 6), st.data())
def test_dimensions_that_went_change_no_map(width: int, data: st.DataObject) -> None:
    """Value and gradients are those of the whole map between gates of one and zero."""
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    gate = torch.zeros(width, dtype=torch.float64).index_fill_(0, kept, 1)
    generator = torch.Generator().manual_seed(width)
    stream, matrix, back = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, width), (width, width), (2, 3, width))
    )
    for x, mapped, whole in (
        (stream * gate, lambda x, m: map_read(x, m[:, kept], kept), lambda x, m: (x * gate) @ m.T),
        (stream, lambda x, m: map_written(x, m[kept], kept), lambda x, m: (x @ m.T) * gate),
    ):
        inputs = [t.clone().requires_grad_() for t in (x, matrix)]
        value, expected = mapped(*inputs), whole(*inputs)
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value, inputs, back)
        torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, back))


def test_maps_follow_autocast() -> None:
    """Where weights are trained in bfloat16, what embeddings write is still float32."""
    output, matrix, kept = torch.ones(1, 2, 4), torch.eye(4), torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert map_written(output, matrix[kept], kept).dtype == torch.bfloat16
        assert map_written(output, matrix, None).dtype == torch.bfloat16


def randomised(name: str) -> Tuning:
    tuning, draw = fresh(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return tuning


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_went_is_let_go_and_nothing_changes(name: str) -> None:
    """Outputs, gradients, directions and rates are those of the whole maps."""
    architecture = architecture_of(name)
    gates = halved(architecture)
    kept = torch.nonzero(gates[Axis.HIDDEN]).flatten()
    found = []
    for is_settled in (False, True):
        tuning = randomised(name)
        masked = MaskedModel(tiny_model(name), architecture, tuning)
        before = sum(matrix.numel() for matrix in tuning.maps.values())
        if is_settled:
            tuning.settle(kept)
            tuning.settle(kept)
            assert sum(matrix.numel() for matrix in tuning.maps.values()) == before / 2
        tuning.is_on = True
        masked.set_gates({**gates, KEPT_HIDDEN: kept})
        logits = masked(tokens(2))
        logits.square().sum().backward()
        rates = [group["peak"] for group in tuning.parameter_groups(0.3, 64)]
        basis = tuning.basis(None)
        assert basis is not None
        directions = [
            columns[:, kept]
            for spec, layer in architecture.named_tensors().values()
            if (columns := basis.at(spec, layer)) is not None
        ]
        grads = {n: p.grad for n, p in tuning.named_parameters() if not n.startswith("maps")}
        for map_name, matrix in tuning.maps.items():
            assert matrix.grad is not None
            along_stream = 0 if map_name.startswith(("start", "write")) else 1
            is_whole = matrix.shape[along_stream] > len(kept)
            grads[map_name] = (
                matrix.grad.index_select(along_stream, kept) if is_whole else matrix.grad
            )
        found.append((logits.detach(), rates, directions, grads))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_tuning_is_recalled(is_settled: bool) -> None:
    tuning, kept = randomised("llama"), torch.arange(0, 24, 3)
    if is_settled:
        tuning.settle(kept)
    again = fresh("llama")
    again.recall({**tuning.state_dict(), "other": torch.ones(1)}, kept)
    saved = again.state_dict()
    assert saved.keys() == tuning.state_dict().keys()
    assert all(saved[name].equal(tensor) for name, tensor in tuning.state_dict().items())


def test_a_start_forgets_what_was_trained() -> None:
    """Of GPT-2 what the final norm adds, too."""
    tuning = fresh("gpt2")
    begun = {name: tensor.clone() for name, tensor in tuning.state_dict().items()}
    assert "shift" in begun
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(1)
    tuning.start(None)
    for name, tensor in tuning.state_dict().items():
        assert tensor.equal(begun[name]), name
