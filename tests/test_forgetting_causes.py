"""Why a model forgets, against small steps, hand-made weights and plain sums."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import score_documents
from mome_utils.forgetting_causes import gradient_cosines, layer_similarity, part_of, weight_drift
from mome_utils.models import build_gpt2
from mome_utils.token_classes import (
    CLASSES,
    byte_classes,
    function_words,
    score_classes,
    token_classes,
)
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)

TEXTS = {
    "en": "the pebbles lie in rows of three and the line is long " * 3,
    "fr": "les cailloux sont posés en rangées de trois, l'été " * 3,
    "py": "def rows(n):\n    return [n % 3 for n in range(n)]\n" * 3,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS.values()] * 3, 300)


def model_of(tokenizer, seed=0, layers=2):
    sizes = {"vocab_size": len(tokenizer), "block_size": 16, "bos": 1, "eos": 2}
    return build_gpt2(Shape(layers, 16, 2), seed=seed, **sizes).eval()


def test_gradient_cosines_predict_what_a_small_step_does(tokenizer):
    expert = model_of(tokenizer, layers=1).double()
    ids = {
        name: torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:16]])
        for name, text in TEXTS.items()
    }
    table = gradient_cosines(expert, {name: (batch, batch) for name, batch in ids.items()})
    np.testing.assert_allclose(np.diag(table), 1)
    np.testing.assert_allclose(table, table.T)

    def loss(name):  # in float64; the model's own loss is float32
        return torch.nn.functional.cross_entropy(expert(input_ids=ids[name]).logits[0, :-1], ids[name][0, 1:])

    before = loss("en")
    length = torch.cat([g.flatten() for g in torch.autograd.grad(before, list(expert.parameters()))]).norm()
    expert.zero_grad()
    loss("fr").backward()
    norm = torch.cat([p.grad.flatten() for p in expert.parameters()]).norm()
    step = 1e-6
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter -= step * parameter.grad / norm
        after = loss("en")
    assert (after - before).item() == pytest.approx(-step * table.loc["en", "fr"] * length.item(), rel=1e-3)


# --- weights and layers


def test_drift_belongs_to_the_part_that_moved(tokenizer):
    before, after = model_of(tokenizer), model_of(tokenizer)
    with torch.no_grad():
        after.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    drift = weight_drift(before, after).set_index("part")["drift"]
    assert list(drift.index) == ["Token embedding", "Positions", "Layer 1, attention", "Layer 1, MLP",
                                 "Layer 2, attention", "Layer 2, MLP", "Final norm"]
    moved = drift["Layer 2, MLP"]
    block = before.transformer.h[1]
    parts = [*block.ln_2.parameters(), *block.mlp.parameters()]
    weight = block.mlp.c_fc.weight.norm().item()
    assert moved == pytest.approx(0.5 * weight / torch.cat([p.flatten() for p in parts]).norm().item(), rel=1e-5)
    assert (drift.drop("Layer 2, MLP") == 0).all()
    with pytest.raises(MomeError, match="not one of a GPT-2"):
        part_of("experts.0.h.1")


def test_layers_are_alike_up_to_the_one_that_changed(tokenizer):
    before, after = model_of(tokenizer), model_of(tokenizer)
    with torch.no_grad():
        for parameter in after.transformer.h[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(3, len(tokenizer), (8, 12), generator=torch.Generator().manual_seed(0))
    found = layer_similarity(before, after, ids).set_index("layer")["similarity"]
    assert list(found.index) == [0, 1, 2]
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(1) and found[2] < 0.9


# --- kinds of tokens


def kinds_of(text, frequent=frozenset(), code=False):
    """Each character with the initial of its class."""
    letters = {"keyword": "k", "function_word": "f", "word": "w", "name": "n", "number": "d", "punctuation": "p",
               "space": " "}
    found = byte_classes(text, frozenset(frequent), code=code)
    assert len(found) == len(text.encode())
    return "".join(letters[CLASSES[i]] for i in found)


def test_prose_has_function_words_names_numbers_and_punctuation():
    text = "The cat of Rome ate 3 fish. Then Ada left!"
    assert kinds_of(text, {"the", "of"}) == "fff www ff nnnn www d wwwwp wwww nnn wwwwp"
    assert kinds_of("été 12e") == "wwwww ddd"  # two bytes for an accented letter
    assert kinds_of("") == ""


def test_code_has_keywords_identifiers_and_prose_in_quotes():
    text = 'def f(x2):  # the sum\n    return "of it" + 10'
    expected = 'kkk npnnpp  p fff www     kkkkkk pff wwp p dd'
    assert kinds_of(text, {"the", "of"}, code=True) == expected
    assert kinds_of('"""if\nnot"""x', code=True) == "pppww wwwpppn"


def test_function_words_are_the_most_frequent_ones():
    assert function_words(["The cat and the dog and the 7 7 7 7 7"], 2) == {"the", "and"}
    assert function_words([], 5) == frozenset()


def test_a_token_has_the_class_of_its_first_solid_byte():
    classes = byte_classes("a 1 ", frozenset(), code=False)
    found = token_classes([1, 2, 1], classes)  # "a", " 1", " "
    assert [CLASSES[i] for i in found] == ["word", "number", "space"]


def test_losses_by_class_add_up_to_the_documents_losses(tokenizer):
    model = model_of(tokenizer)
    documents = [Document(f"{i}", name, "g", "t", text[i:]) for name, text in TEXTS.items() for i in (0, 7, 100)]
    frequent = {name: function_words([text], 3) for name, text in TEXTS.items()}

    def logits(ids):
        return model(input_ids=ids, use_cache=False).logits

    rows = score_classes(logits, tokenizer, documents, frequent, block_size=16, stride=8, batch_size=4)
    whole = score_documents(logits, tokenizer, documents, block_size=16, stride=8)
    sums = rows.groupby(["language", "document"], sort=False)[["nats", "bytes", "tokens"]].sum().reset_index()
    pd.testing.assert_frame_equal(sums, whole, check_dtype=False, rtol=1e-6)
    assert set(rows.loc[rows["language"] == "py", "token_class"]) >= {"keyword", "name", "number", "punctuation"}
    assert "keyword" not in set(rows.loc[rows["language"] == "en", "token_class"])
    # One document of a single window, token by token.
    document = documents[2]
    ids = torch.tensor([[1, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]])[:, :16]
    own = [d for d in documents if d is document]
    with torch.no_grad():
        log_p = logits(ids)[0].log_softmax(-1)
    tokens = [tokenizer.convert_ids_to_tokens([int(i)])[0].replace("Ġ", " ") for i in ids[0, 1:]]
    assert "".join(tokens) == document.text[: len("".join(tokens))]
    if len(tokenizer(document.text)["input_ids"]) < 16:
        found = score_classes(logits, tokenizer, own, frequent, block_size=16, stride=8)
        assert found["nats"].sum() == pytest.approx(-sum(float(log_p[t, i]) for t, i in enumerate(ids[0, 1:])))
