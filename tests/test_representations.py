"""Passages and the states that models make of them: against single sequences, hand-made hooks, and saved models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mome_utils import representations as reps
from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.models import build_gpt2
from mome_utils.moe import MomeForCausalLM, build_mome

SIZES = dict(vocab_size=32, block_size=16, bos=0, eos=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i + 2 for i in range(30)} | {"<s>": 0, "</s>": 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def document(words: int, number: int = 0) -> Document:
    return Document(f"d{number}", "en", "g", "t", " ".join(f"w{i}" for i in range(words)))


def gpt2(seed: int = 0, layers: int = 2) -> GPT2LMHeadModel:
    return build_gpt2(Shape(layers, 8, 2), seed=seed, **SIZES).eval()


# ------------------------------------------------------------------------------------------------------------ passages


def test_passages_are_equal_pieces_without_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    found = reps.cut_passages(tokenizer, [document(14)], tokens=5, per_document=9)
    assert [p.ids for p in found] == [(0, 2, 3, 4, 5), (0, 6, 7, 8, 9), (0, 10, 11, 12, 13)]  # two words are left over
    assert {(p.language, p.topic) for p in found} == {("en", "d0")}
    spread = reps.cut_passages(tokenizer, [document(24)], tokens=5, per_document=3)
    assert [p.ids[1] for p in spread] == [2, 10, 22]  # the first, a middle and the last of six
    short = reps.cut_passages(tokenizer, [document(3, 1), document(4, 2)], tokens=5, per_document=1)
    assert [p.ids for p in short] == [(0, 2, 3, 4), (0, 2, 3, 4, 5)]


@pytest.mark.parametrize(("tokens", "number"), [(1, 1), (5, 0)])
def test_passages_of_nothing_get_one_sentence(
    tokenizer: PreTrainedTokenizerFast, tokens: int, number: int
) -> None:
    with pytest.raises(MomeError, match=f"{number} passages of {tokens} tokens hold nothing"):
        reps.cut_passages(tokenizer, [document(9)], tokens=tokens, per_document=number)


# -------------------------------------------------------------------------------------------------------------- states


def test_states_are_those_of_each_sequence_alone() -> None:
    model, sequences = gpt2(), [[0, 5, 6, 7, 8], [0, 9], [0, 3, 4]]
    found = reps.hidden_states(reps.layer_reader(model), sequences, pad=1, batch_size=2)
    assert set(found) == set(reps.AGGREGATIONS)
    assert [layer.shape for layer in found["final"]] == [(3, 8)] * 3
    for row, ids in enumerate(sequences):
        with torch.no_grad():
            layers = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for number, layer in enumerate(layers):
            assert found["final"][number][row] == pytest.approx(layer[0, -1].numpy(), abs=1e-5)
            assert found["mean"][number][row] == pytest.approx(layer[0].mean(0).numpy(), abs=1e-5)


def test_other_architectures_are_read_too() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    found = reps.hidden_states(reps.layer_reader(model), [[0, 5, 6, 7], [0, 9]], pad=1)
    assert [layer.shape for layer in found["mean"]] == [(2, 16)] * 4
    with torch.no_grad():
        alone = model(torch.tensor([[0, 9]]), output_hidden_states=True).hidden_states
    assert found["final"][-1][1] == pytest.approx(alone[-1][0, -1].numpy(), abs=1e-5)


@pytest.mark.parametrize("variant", ["jeet", "moe_ce"])
def test_layers_of_an_expert_lead_from_the_embedding_to_its_last_states(variant: str) -> None:
    model = build_mome(variant, Shape(2, 8, 2), languages=("en", "py"), seed=0, **SIZES).eval()
    ids, mask = torch.tensor([[0, 5, 6, 7], [0, 9, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for name in ("en", "py", *(("common",) if variant == "moe_ce" else ())):
        expert, written = model.common if name == "common" else model.experts[model.languages.index(name)], []
        hook = expert.h[0].register_forward_hook(lambda _, given, out, kept=written: kept.append(out))
        with torch.no_grad():
            layers = reps.expert_reader(model, name)(ids, mask)
        hook.remove()
        assert len(layers) == 3
        assert torch.equal(layers[1], written[0])
        assert torch.equal(layers[-1], model.expert_hidden(name, ids, mask))
        assert torch.allclose(layers[0][0], model.embed(ids)[0], atol=1e-6)
        assert not torch.allclose(layers[1], layers[2])
        assert not any(block._forward_pre_hooks for block in expert.h)  # nothing is left behind


def test_a_ple_expert_is_read_as_the_model_it_was() -> None:
    experts = {"en": gpt2(0), "py": gpt2(1)}
    model = MomeForCausalLM.from_experts(experts).eval()
    sequences = [[0, 5, 6], [0, 7, 8]]
    for name, alone in experts.items():
        inside = reps.hidden_states(reps.expert_reader(model, name), sequences, pad=1)
        outside = reps.hidden_states(reps.layer_reader(alone), sequences, pad=1)
        assert all(np.array_equal(a, b) for a, b in zip(inside["mean"], outside["mean"], strict=True))
    with pytest.raises(MomeError, match="no expert 'common': its experts are en, py"):
        reps.expert_reader(model, "common")


@pytest.mark.parametrize("sequences", [[], [[0, 2], []]])
def test_nothing_to_read_gets_one_sentence(sequences: list[list[int]]) -> None:
    with pytest.raises(MomeError, match="nothing to read"):
        reps.hidden_states(reps.layer_reader(gpt2()), sequences, pad=1)


def test_topic_means_follow_their_names() -> None:
    names, means = reps.topic_means(np.array([[1.0, 0], [3, 0], [0, 8]], dtype=np.float32), ["b", "b", "a"])
    assert names == ["a", "b"]
    assert means.tolist() == [[0, 8], [2, 0]]


# ------------------------------------------------------------------------------------------------ models from elsewhere


def test_a_saved_model_is_loaded_by_its_folder_and_reads_texts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = gpt2(3)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    loaded, own = reps.load_causal_lm(str(tmp_path / "lm"))
    texts = ["w1 w2 w3", "w9", " ".join(["w4"] * 40)]  # the last is longer than the model's context
    found = reps.text_states(loaded, own, texts)
    assert found["final"][0].shape == (3, 8)
    expected = reps.hidden_states(reps.layer_reader(model), [[3, 4, 5], [11], [6] * 16], pad=1)
    assert found["mean"][-1] == pytest.approx(expected["mean"][-1], abs=1e-5)


def test_a_model_that_is_not_there_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MomeError, match="cannot be loaded: check its name or folder"):
        reps.load_causal_lm(str(tmp_path))
