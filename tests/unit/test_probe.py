"""Probing: shares counted exactly, one layer at a time, tests that find what is there."""

import gc
import weakref

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from llm_vtrans.probe.attention import attention_modules, measure, shares_of, watching
from llm_vtrans.probe.command import looks_back
from llm_vtrans.probe.significance import NUM_PERMUTATIONS, compare, holm
from llm_vtrans.probe.texts import Windows, cut, keywords
from tests.tiny import CONFIGS, save_tiny, tiny_model


def windows(batch=2, length=6, vocab=90):
    ids = torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    is_token = torch.ones(batch, length, dtype=torch.bool)
    is_special = torch.zeros_like(is_token)
    is_special[:, 0] = True
    is_keyword = torch.zeros_like(is_token)
    is_keyword[:, 2] = True
    return Windows(ids, is_token, is_special, is_keyword)


def test_shares_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])[None, None]
    flags = torch.tensor([[True, True, True], [True, False, False], [False, False, True]])
    batch = Windows(torch.zeros(1, 3).long(), flags[:1], flags[1:2], flags[2:])
    # Queries 1 and 2 count; the keyword at position 2 is query 2's current token.
    expected = torch.tensor([[0.25 + 0.1, 0.5 + 0.7, 0.25 + 0.2, 0.25, 0.25]])
    torch.testing.assert_close(shares_of(weights, batch), expected.double())


def eager(name):
    if name == "bert":
        torch.manual_seed(0)
        config = BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=3,
                            num_attention_heads=4, intermediate_size=12)  # fmt: skip
        model = BertForMaskedLM(config).eval()
    else:
        model = tiny_model(name)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_shares_are_those_of_the_library_and_batches_do_not_matter(name):
    model, data = eager(name), windows(batch=5)
    shares, even = measure(model, data, 2, is_causal=name != "bert")
    with torch.no_grad():
        attentions = model(data.input_ids, output_attentions=True).attentions
    expected = torch.stack([shares_of(w, data) for w in attentions]) / 25
    torch.testing.assert_close(shares, expected)
    again, _ = measure(model, data, 5, is_causal=name != "bert")
    torch.testing.assert_close(shares, again)
    sees = torch.arange(2, 7) if name != "bert" else torch.full((5,), 6)
    assert even[0] == pytest.approx((1 / sees).mean().item())
    assert (shares[..., 3] == 0).all() == (name != "bert")  # decoders see no next token


def test_one_layer_at_a_time():
    model, alive, most = eager("llama"), [], []

    def see(layer, weights):
        gc.collect()
        alive.append(weakref.ref(weights))
        most.append(sum(ref() is not None for ref in alive))

    with torch.no_grad(), watching(model, see):
        model(windows().input_ids)
    assert len(alive) == len(attention_modules(model)) == 3 and max(most) == 1


def test_tests_find_a_difference_and_none_where_there_is_none():
    random = np.random.default_rng(0)
    is_kept = random.random((6, 8)) < 0.5
    shares = random.random((6, 8, 2)) * 0.1
    shares[..., 0] += 0.1 * is_kept
    found, nothing = compare(shares, is_kept, is_kept + 0.01 * random.random((6, 8)))
    assert found["p_value"] == pytest.approx(1 / (NUM_PERMUTATIONS + 1))
    assert found["p_within_layers"] < 1e-3 and found["cliffs_delta"] > 0.99
    assert found["kept"] - found["pruned"] == pytest.approx(0.1, abs=0.02)
    assert found["cohens_d"] > 2 and found["spearman"] > 0.7
    assert nothing["p_value"] > 0.05 and abs(nothing["cohens_d"]) < 0.8
    assert nothing["p_holm"] >= nothing["p_value"]


def test_a_difference_between_layers_is_not_one_between_heads():
    random = np.random.default_rng(1)
    is_kept = np.array([[True] * 7 + [False], [False] * 7 + [True]])
    shares = random.random((2, 8, 1)) * 0.01 + np.array([0.5, 0.0])[:, None, None]
    (found,) = compare(shares, is_kept, is_kept * 1.0)
    assert found["p_value"] < 0.01 and found["p_within_layers"] > 0.2


def test_where_all_heads_stay_the_signal_still_tells():
    random = np.random.default_rng(2)
    shares = random.random((6, 8, 1))
    (found,) = compare(shares, np.ones((6, 8), dtype=bool), shares[..., 0] ** 2)
    assert found["spearman"] == pytest.approx(1) and found["p_spearman"] < 0.001
    assert {v for k, v in found.items() if "spearman" not in k} == {None}


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_keywords_are_rare_content_words():
    common = "the of and with some other words here"
    documents = [f"{common} unique{i}x rare{'abcdefgh'[i]}word ab{i}" for i in range(8)]
    chosen = keywords(documents)
    assert "rareaword" in chosen and "ab" not in chosen
    assert chosen.isdisjoint(common.split())


def test_windows_of_a_decoder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny("llama", tmp_path / "m"))
    made = cut(tokenizer, ["ABCDEFGH", "IJKLMNOP", "QRSTUVWX"], 5, 9, is_causal=True)
    assert made.input_ids.shape == (4, 5) and bool(made.is_token.all())
    assert made.is_special[:, 0].all() and not made.is_special[:, 1:].any()


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_who_looks_back_whatever_the_head(name):
    model, seen = tiny_model(name), []
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 90, (1, 2, 6) if name.endswith("choose") else (1, 6))
    with watching(model, lambda layer, weights: seen.append(weights)):
        model(ids)
    assert looks_back(model.config) == all(bool((w.triu(1) == 0).all()) for w in seen)
