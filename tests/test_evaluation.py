"""Document scores and their intervals: every token once, and honest about few seeds."""

from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.config import Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import (
    EvaluationError,
    IntervalError,
    bits_per_byte,
    crossed_interval,
    encode_documents,
    interval,
    paired_interval,
    perplexity,
    score_documents,
    window_batches,
    windows,
)
from mome_utils.intervals import seed_interval
from mome_utils.models import build_gpt2
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)
BLOCK, STRIDE = 16, 6


def document(name: str, language: str, text: str) -> Document:
    return Document(id=name, language=language, group="g", title=name, text=text)


TEXTS = {
    "short": "Ein Bär.",
    "long": "Überall wächst Gras — naïve café, 東京, and a plain sentence. " * 4,
    "edge": "abc " * 7,
    "empty": "",
    "marker": "the string </s> is text, not a token",
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS.values(), "more words to merge, more words"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = Shape(layers=2, width=16, heads=2)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return build_gpt2(shape, vocab_size=len(tokenizer), block_size=BLOCK, seed=3, bos=bos, eos=eos).eval()


@pytest.fixture(scope="module")
def documents():
    return [document(name, "en" if i % 2 else "de", text) for i, (name, text) in enumerate(TEXTS.items())]


def logits_of(model):
    return lambda ids: model(input_ids=ids, use_cache=False).logits


# --- windows ---------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(2, 40), st.data())
@settings(max_examples=300, deadline=None)
def test_windows_score_every_target_once_with_the_promised_context(length, block_size, data):
    stride = data.draw(st.integers(1, block_size - 1))
    found = windows([0] * length, block_size, stride)
    assert [t for _, end, first in found for t in range(first, end)] == list(range(1, length))
    for number, (start, end, first) in enumerate(found):
        assert start == number * stride and 0 <= start < first < end <= length
        assert end - start <= block_size
        if number:
            assert first - start >= block_size - stride
    if found:  # what follows a target does not change what it sees
        assert windows([0] * (length + 7), block_size, stride)[: len(found) - 1] == found[:-1]


@pytest.mark.parametrize("block_size, stride", [(8, 0), (8, 8), (1, 1), (8, -2)])
def test_windows_refuse_a_stride_that_skips_tokens(block_size, stride):
    with pytest.raises(EvaluationError, match="stride"):
        windows([0] * 20, block_size, stride)


# --- scores ----------------------------------------------------------------------------------------------


def slow_nats(model, ids: list[int]) -> float:
    """One window, one target at a time, in float64 arithmetic on the model's own logits."""
    total, start, scored = 0.0, 0, 1
    while scored < len(ids):
        window = ids[start : start + BLOCK]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        for place in range(scored - start, len(window)):
            total -= torch.log_softmax(logits[place - 1], -1)[window[place]].item()
        scored, start = start + len(window), start + STRIDE
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_agree_with_one_window_at_a_time(model, tokenizer, documents, batch_size):
    rows = score_documents(
        logits_of(model), tokenizer, documents, block_size=BLOCK, stride=STRIDE, batch_size=batch_size
    )
    assert list(rows["document"]) == [d.id for d in documents]
    assert list(rows["language"]) == [d.language for d in documents]
    assert list(rows["bytes"]) == [len(d.text.encode()) for d in documents]
    sequences = encode_documents(tokenizer, documents)
    assert list(rows["tokens"]) == [len(ids) - 1 for ids in sequences]
    assert rows["nats"].dtype == np.float64
    expected = [slow_nats(model, ids) for ids in sequences]
    np.testing.assert_allclose(rows["nats"], expected, rtol=1e-5, atol=1e-6)
    lean = score_documents(model, tokenizer, documents, block_size=BLOCK, stride=STRIDE, batch_size=batch_size)
    np.testing.assert_allclose(lean["nats"], rows["nats"], rtol=1e-6)  # a GPT-2's unscored positions get no logits
    assert rows.set_index("document").loc["empty", ["nats", "bytes", "tokens"]].tolist() == [0, 0, 0]


def test_short_documents_get_their_full_context_value(model, tokenizer):
    text = "Ein Bär."
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    assert ids.shape[1] <= BLOCK
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    rows = score_documents(
        logits_of(model), tokenizer, [document("x", "de", text)], block_size=BLOCK, stride=STRIDE
    )
    assert rows["nats"][0] == pytest.approx(loss, rel=1e-5)


def test_every_byte_of_a_text_is_scored_and_no_special_token(model, tokenizer, documents):
    for batch in window_batches(tokenizer, documents, BLOCK, STRIDE, 4):
        assert not set(batch.targets.tolist()) & set(tokenizer.all_special_ids)
        assert batch.ids.shape[1] <= BLOCK
        assert torch.equal(batch.ids[batch.rows, batch.columns + 1], batch.targets)
        assert not (batch.ids[batch.mask] == tokenizer.eos_token_id).any()
        assert (batch.ids[~batch.mask] == tokenizer.eos_token_id).all()
    targets: dict[int, list[int]] = {}
    for batch in window_batches(tokenizer, documents, BLOCK, STRIDE, 1):
        for owner, target in zip(batch.target_owners.tolist(), batch.targets.tolist(), strict=True):
            targets.setdefault(owner, []).append(target)
    decoded = {owner: tokenizer.decode(ids) for owner, ids in targets.items()}
    assert decoded == {i: d.text for i, d in enumerate(documents) if d.text}


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(tokenizer, documents):
    size = len(tokenizer)
    rows = score_documents(
        lambda ids: torch.zeros(*ids.shape, size), tokenizer, documents, block_size=BLOCK, stride=STRIDE
    )
    np.testing.assert_allclose(rows["nats"], rows["tokens"] * math.log(size), rtol=1e-6)
    table = perplexity(rows).set_index("language")["perplexity"]
    np.testing.assert_allclose(table, size, rtol=1e-5)


def test_bits_per_byte_sums_before_it_divides_and_averages_languages():
    rows = pd.DataFrame(
        {
            "arm": "a",
            "language": ["en", "en", "de"],
            "document": ["1", "2", "1"],
            "nats": np.array([1.0, 5.0, 8.0]) * math.log(2),
            "bytes": [1, 2, 2],
            "tokens": [1, 1, 4],
        }
    )
    table = bits_per_byte(rows, by=["arm"]).set_index("language")["bits_per_byte"]
    assert table.to_dict() == pytest.approx({"de": 4.0, "en": 2.0, "mean": 3.0})
    per_token = perplexity(rows).set_index("language")["perplexity"]
    assert per_token.to_dict() == pytest.approx({"de": 4.0, "en": 8.0, "mean": math.sqrt(32)})


# --- intervals -------------------------------------------------------------------------------------------


def study(generator, seeds=3, topics=40, *, effect=1.5, of_seed=0.1, of_topic=0.2, of_both=0.1):
    """Rows of a study whose true score is `effect`: crossed effects of seeds, topics and their pairs."""
    value = (
        effect
        + generator.normal(0, of_seed, (seeds, 1, 1))
        + generator.normal(0, of_topic, (1, topics, 1))
        + generator.normal(0, of_both, (seeds, topics, 2))
    )
    seed, topic, language = np.meshgrid(range(seeds), range(topics), [0, 1], indexing="ij")
    return pd.DataFrame(
        {
            "seed": seed.ravel(),
            "document": topic.ravel(),
            "language": np.array(["en", "fr"])[language.ravel()],
            "nats": value.ravel() * 100 * math.log(2),
            "bytes": 100,
            "tokens": 40,
        }
    )


@pytest.mark.parametrize("spread", [(0.1, 0.1, 0.1), (0.1, 0.5, 0.2), (0.02, 0.5, 0.5)])
def test_intervals_cover_where_a_bootstrap_over_three_seeds_does_not(spread):
    generator = np.random.default_rng(7)
    of_seed, of_topic, of_both = spread
    studies, covered, plain = 200, 0, 0
    for _ in range(studies):
        rows = study(generator, of_seed=of_seed, of_topic=of_topic, of_both=of_both)
        found = interval(rows, draws=300)
        covered += found.low <= 1.5 <= found.high
        seeds = rows["nats"].to_numpy().reshape(3, -1).mean(1) / 100 / math.log(2)
        low, high = np.percentile(generator.choice(seeds, (300, 3)).mean(1), [2.5, 97.5])
        plain += low <= 1.5 <= high
    assert covered / studies >= 0.90
    assert plain / studies < min(0.85, covered / studies - 0.05)


def test_pairing_removes_what_both_arms_share():
    generator = np.random.default_rng(1)
    a = study(generator, of_seed=0.05, of_topic=1.0)
    b = a.assign(nats=a["nats"] + 3.0 * math.log(2) + generator.normal(0, 0.1, len(a)))
    found = paired_interval(b, a)
    assert found.estimate == pytest.approx(0.03, abs=0.003)
    assert found.low > 0 and found.high - found.low < 0.1 * (interval(a).high - interval(a).low)
    assert (found.seeds, found.documents) == (3, 40)
    back = paired_interval(a, b)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    exact = bits_per_byte(b).iloc[-1, -1] - bits_per_byte(a).iloc[-1, -1]
    assert found.estimate == pytest.approx(exact)


def test_perplexity_ratio_of_a_pair():
    a = study(np.random.default_rng(2))
    b = a.assign(nats=a["nats"] + a["tokens"] * math.log(1.1))
    ratio = paired_interval(b, a, measure="nats_per_token").exponential()
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((1.1, 1.1, 1.1))


def test_an_interval_is_the_same_every_time_and_for_any_order_of_rows():
    rows = study(np.random.default_rng(3))
    assert interval(rows) == interval(rows.sample(frac=1, random_state=0))


def test_one_seed_rests_on_documents_and_one_of_each_on_nothing():
    rows = study(np.random.default_rng(4))
    one = rows[rows["seed"] == 1]
    assert interval(one) == interval(one, by="document") == interval(one.drop(columns="seed"))
    assert interval(one).seeds == 1
    assert math.isinf(interval(one, by="seed").high)
    assert math.isinf(interval(one[one["document"] == 0]).low)
    assert interval(rows, by="seed").high - interval(rows, by="seed").low > 0


def test_one_value_per_seed_gives_students_interval():
    found = seed_interval([1.0, 2.0, 3.0])
    assert (found.estimate, found.seeds, found.documents) == (2.0, 3, 0)
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3))  # t(2) times the standard error
    assert math.isinf(seed_interval([1.0]).high)
    for values in ([], [float("nan")]):
        with pytest.raises(IntervalError, match="one finite value per seed"):
            seed_interval(values)


def test_documents_of_only_one_language_are_resampled_too():
    rows = study(np.random.default_rng(5))
    unaligned = rows.assign(document=rows["language"] + rows["document"].astype(str))
    found = interval(unaligned)
    assert found.documents == 80 and found.estimate == pytest.approx(interval(rows).estimate)


def test_two_thousand_draws_take_less_than_a_second():
    rows = study(np.random.default_rng(6), seeds=5, topics=200)
    started = time.perf_counter()
    interval(rows)
    assert time.perf_counter() - started < 1


def test_a_statistic_of_cells_is_recomputed_in_every_draw():
    rows = study(np.random.default_rng(8), of_topic=0.5)
    best = crossed_interval(rows, ["language"], lambda cells: cells.min(-1))
    table = bits_per_byte(rows, by=["seed"]).query("language != 'mean'")
    assert best.estimate == pytest.approx(table.groupby("seed")["bits_per_byte"].min().mean())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.drop(columns="nats"), "lack the columns"),
        (lambda rows: rows.iloc[:0], "no scores"),
        (lambda rows: pd.concat([rows, rows.iloc[:1]]), "scored twice"),
        (lambda rows: rows.iloc[2:], "Not every seed"),
    ],
)
def test_incomplete_rows_are_refused_in_one_sentence(change, message):
    with pytest.raises(IntervalError, match=message):
        interval(change(study(np.random.default_rng(9))))


def test_pairs_need_common_seeds_and_documents():
    rows = study(np.random.default_rng(10))
    with pytest.raises(IntervalError, match="no seed"):
        paired_interval(rows, rows.assign(seed=rows["seed"] + 10))
    with pytest.raises(IntervalError, match="different documents"):
        paired_interval(rows, rows[rows["document"] > 0])
    with pytest.raises(IntervalError, match="Unknown measure"):
        interval(rows, measure="accuracy")
    with pytest.raises(IntervalError, match="Cannot resample"):
        interval(rows, by="language")
    assert paired_interval(rows, rows[rows["seed"] < 2]).seeds == 2
