"""Fitting the router: features as published, crops, calibration, and what is kept of the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mome_utils.config import MomeError
from mome_utils.corpus import load_corpus
from mome_utils.router_calibration import calibrate
from mome_utils.router_fit import (
    AS_MEANT_PATTERN,
    INDEPENDENT,
    PUBLISHED_PATTERN,
    Crops,
    TokenTfidf,
    count_tokens,
    fit_router,
    from_sklearn,
    labelled,
    random_crops,
    token_statistics,
    top_features,
    words,
)
from mome_utils.tokenization import encode, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60
LANGUAGES = ("en", "fr", "de", "py")


def synthetic(languages: int, number: int = 40, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences [number, length] of each language, from overlapping distributions; id 59 never occurs.

    The distributions are always the same, the sequences go with the seed.
    """
    chances = np.random.default_rng(0).dirichlet(np.full(VOCAB - 1, 0.4), size=len(LANGUAGES))
    generator = np.random.default_rng((1, seed))
    return {
        name: generator.choice(VOCAB - 1, size=(number, length), p=chance)
        for name, chance in zip(LANGUAGES[:languages], chances, strict=False)
    }


# --------------------------------------------------------------------------------------------------- features


def test_features_equal_the_vectorizer_on_ids_written_as_words():
    blocks = [row.tolist() for block in synthetic(3).values() for row in block]
    unseen = [[59, 59], [], [0, 1, 2], [59, 30, 30, 4]]
    for pattern, published in ((AS_MEANT_PATTERN, False), (PUBLISHED_PATTERN, True)):
        vectorizer = TfidfVectorizer(token_pattern=pattern).fit(words(blocks))
        ours = TokenTfidf(published_tokens=published).fit(count_tokens(blocks, VOCAB))
        order = [vectorizer.vocabulary_[str(token)] for token in ours.tokens_]
        assert len(order) == len(vectorizer.vocabulary_)
        for sequences in (blocks, unseen):
            expected = vectorizer.transform(words(sequences))[:, order].toarray()
            np.testing.assert_allclose(
                ours.transform(count_tokens(sequences, VOCAB)).toarray(), expected, atol=1e-12
            )


def test_the_published_token_pattern_drops_the_ids_0_to_9():
    sequences = [list(range(VOCAB))]
    published = TfidfVectorizer(token_pattern=PUBLISHED_PATTERN).fit(words(sequences))
    assert TfidfVectorizer().token_pattern == PUBLISHED_PATTERN
    assert {int(word) for word in published.get_feature_names_out()} == set(range(10, VOCAB))
    assert TokenTfidf(published_tokens=True).fit(count_tokens(sequences, VOCAB)).tokens_.min() == 10
    router = fit_router(synthetic(2), VOCAB, published_tokens=True)
    ids = torch.tensor([[30, 31, 40]])
    noisy = torch.cat([ids, torch.arange(10)[None]], dim=1)
    torch.testing.assert_close(router(ids), router(noisy))


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(MomeError, match="outside the router's vocabulary of 60"):
        count_tokens([[60]], VOCAB)
    with pytest.raises(MomeError, match="outside"):
        count_tokens([[-1]], VOCAB)
    with pytest.raises(MomeError, match="without text for fr"):
        fit_router({"en": [[1, 2]], "fr": []}, VOCAB)
    with pytest.raises(MomeError, match="two or more languages"):
        fit_router({"en": [[1, 2]]}, VOCAB)
    counts, labels = labelled(synthetic(3), VOCAB)
    vectorizer = TokenTfidf().fit(counts)
    forest = RandomForestClassifier(3).fit(vectorizer.transform(counts), labels)
    with pytest.raises(MomeError, match="RandomForestClassifier is not"):
        from_sklearn(vectorizer, forest, LANGUAGES[:3])
    linear = LogisticRegression().fit(vectorizer.transform(counts), labels)
    with pytest.raises(MomeError, match="knows 3 classes, but 2 names"):
        from_sklearn(vectorizer, linear, ("en", "fr"))
    bigrams = TfidfVectorizer(token_pattern=AS_MEANT_PATTERN, ngram_range=(1, 2)).fit(["1 2"])
    with pytest.raises(MomeError, match="plain TF-IDF"):
        from_sklearn(bigrams, linear, LANGUAGES[:3], vocab_size=VOCAB)


def test_top_features_are_decoded_and_belong_to_their_language():
    corpus = load_corpus("embedded", topics=16, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 700)
    blocks = {name: encode(tokenizer, [d.text for d in corpus.of_language(name)]) for name in corpus.languages}
    table = top_features(fit_router(blocks, 700), tokenizer, n=12)
    assert list(table.groupby("language", sort=False).size()) == [12] * len(blocks)
    texts = {name: set(part["text"].str.strip()) for name, part in table.groupby("language")}
    assert "the" in texts["en"] and "der" in texts["de"] and "=" in texts["py"]
    assert table.groupby("language")["weight"].apply(lambda w: w.is_monotonic_decreasing).all()


# ------------------------------------------------------------------------------------------------------ crops


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 6), st.integers(0, 3))
def test_crops_are_pieces_of_their_sequence_no_shorter_than_asked(lengths, number, shortest, seed):
    sequences = [np.arange(length) + 100 * i for i, length in enumerate(lengths)]
    pieces = random_crops(sequences, Crops(number, shortest), seed)
    assert len(pieces) == number * len(sequences)
    for i, piece in enumerate(pieces):
        whole = sequences[i // number]
        assert min(shortest, len(whole)) <= len(piece) <= len(whole)
        if len(piece):
            assert (np.diff(piece) == 1).all() and piece[0] >= whole[0] and piece[-1] <= whole[-1]
    again = random_crops(sequences, Crops(number, shortest), seed)
    assert all(np.array_equal(a, b) for a, b in zip(pieces, again, strict=True))


def test_lengths_of_crops_are_log_uniform_and_places_uniform():
    pieces = random_crops([np.arange(64)], Crops(20_000), 0)
    lengths = np.array([len(piece) for piece in pieces])
    for n in (1, 2, 7, 40, 64):  # the whole part of 65^u is n or less when u < log(n + 1) / log(65)
        assert (lengths <= n).mean() == pytest.approx(np.log(n + 1) / np.log(65), abs=0.01)
    starts = np.array([piece[0] for piece in pieces if len(piece) == 1])
    assert np.bincount(starts, minlength=64).min() > 0.5 * len(starts) / 64
    with pytest.raises(MomeError, match="number of 0 or more"):
        Crops(-1)
    for wrong in ({"shortest": 0}, {"shortest": 8, "longest": 4}):
        with pytest.raises(MomeError, match="lengths of 1 or more"):
            Crops(4, **wrong)


def test_crops_can_be_short_begin_at_the_beginning_and_be_of_several_kinds():
    text = np.arange(100)
    prompts, short = Crops(900, 2, 40, from_start=True), Crops(900, 3, 5)
    heads, middles = random_crops([text], prompts, 0), random_crops([text], short, 0)
    assert {piece[0] for piece in heads} == {0} and {len(piece) for piece in heads} == set(range(2, 41))
    assert {len(piece) for piece in middles} == {3, 4, 5} and len({piece[0] for piece in middles}) > 60
    assert all((np.diff(piece) == 1).all() for piece in [*heads, *middles])
    both = random_crops([text, text[:1]], [prompts, short], 0)
    assert [len(both), *map(len, both[900:1800]), *map(len, both[2700:])] == [3600, *[1] * 1800]
    assert random_crops([text], None, 0) == random_crops([text], [], 0) == []


def test_a_router_fitted_on_crops_is_the_published_pipeline_on_the_same_crops():
    blocks, crops = synthetic(3), Crops(3)
    exact = LogisticRegression(max_iter=1000, tol=1e-10)
    router = fit_router(blocks, VOCAB, model=exact, crops=crops, seed=5)
    training = {name: [*part, *random_crops(part, crops, 5)] for name, part in blocks.items()}
    texts = [text for part in training.values() for text in words(part)]
    tfidf = TfidfVectorizer(token_pattern=AS_MEANT_PATTERN).fit([t for part in blocks.values() for t in words(part)])
    exact.fit(tfidf.transform(texts), np.repeat(range(3), [len(part) for part in training.values()]))
    pipe = make_pipeline(tfidf, exact)
    ids = np.random.default_rng(0).integers(0, VOCAB, size=(50, 6))
    np.testing.assert_allclose(router(torch.from_numpy(ids)), pipe.decision_function(words(ids)), atol=1e-5)
    first, again, other = (fit_router(blocks, VOCAB, crops=crops, seed=seed).weight for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_weights_are_repetitions_and_crops_come_from_the_texts():
    blocks, texts, crops = synthetic(3), synthetic(3, number=4, length=90, seed=8), Crops(2)
    names = list(blocks)
    model = LogisticRegression(max_iter=5000, tol=1e-12)
    router = fit_router(
        blocks, VOCAB, model=model, crops=crops, texts=texts, block_weight=2, emphasis={names[1]: 3}, seed=5
    )
    training = {name: [*part, *part, *random_crops(texts[name], crops, 5)] for name, part in blocks.items()}
    training[names[1]] *= 3
    counts, labels = labelled(training, VOCAB)
    tfidf = TokenTfidf().fit(labelled(blocks, VOCAB)[0])
    repeated = from_sklearn(tfidf, model.fit(tfidf.transform(counts), labels), names)
    torch.testing.assert_close(router.weight, repeated.weight, atol=1e-4, rtol=0)
    assert torch.equal(router.statistics, fit_router(blocks, VOCAB).statistics)
    for wrong in ({"emphasis": {"xx": 2}}, {"emphasis": {names[0]: 0}}, {"block_weight": 0}):
        with pytest.raises(MomeError, match="Weights must be positive"):
            fit_router(blocks, VOCAB, **wrong)


def test_emphasis_wins_doubtful_text():
    shared = np.random.default_rng(0).integers(0, 20, size=(60, 12))  # text that either could have written
    own = {"a": np.full((60, 12), 30), "b": np.full((60, 12), 31)}
    blocks = {name: np.concatenate([shared, part]) for name, part in own.items()}
    for name, favoured in (("a", 0), ("b", 1)):
        router = fit_router(blocks, VOCAB, emphasis={name: 4})
        assert (router.route(torch.from_numpy(shared)) == favoured).all()
        assert router.route(torch.full((1, 12), 31)) == 1 and router.route(torch.full((1, 12), 30)) == 0


def test_crops_make_a_router_better_on_short_sequences():
    train, test = synthetic(4, number=60, length=64), synthetic(4, number=300, length=64, seed=1)

    def right(router: object, n: int) -> float:
        rows = enumerate(test.values())
        return float(np.mean([(router.route(torch.from_numpy(row[:, :n])) == i).double().mean() for i, row in rows]))

    published, cropped = (fit_router(train, VOCAB, crops=crops) for crops in (None, Crops(8)))
    assert right(cropped, 4) > right(published, 4) + 0.03
    assert right(cropped, 64) == right(published, 64) == 1


# ------------------------------------------------------------------------------------------------ calibration


def negative_log_likelihood(router: object, blocks: dict[str, np.ndarray], n: int) -> float:
    ids = [torch.from_numpy(block[:, s : s + n]) for block in blocks.values() for s in (0, 5)]
    chance = [router.probabilities(x)[:, i // 2] for i, x in enumerate(ids)]
    return -float(torch.cat(chance).log().mean())


def test_calibration_lowers_the_loss_at_every_length_and_changes_no_decision():
    router = fit_router(synthetic(4, length=32), VOCAB, crops=Crops(4), model=LogisticRegression(C=1000, max_iter=3000))
    held_out, fresh = (synthetic(4, number=number, length=32, seed=number) for number in (200, 400))
    calibrated = calibrate(router, held_out, seed=1)
    assert (router.temperature == 1).all() and router.temperature is not calibrated.temperature
    for name in ("idf", "weight", "bias", "statistics", "concentration", "threshold"):
        assert torch.equal(router.get_buffer(name), calibrated.get_buffer(name))
    assert (calibrated.temperature[6:] == calibrated.temperature[5]).all()  # 32 tokens are the longest seen
    assert len(set(calibrated.temperature[:6].tolist())) == 6
    for n in (1, 2, 4, 8, 16):
        assert negative_log_likelihood(calibrated, fresh, n) < negative_log_likelihood(router, fresh, n) - 1e-4
    assert torch.equal(calibrate(router, held_out, seed=1).temperature, calibrated.temperature)
    assert (calibrated.temperature > 0).all()


def test_the_temperature_is_the_one_of_least_loss():
    """Logits that are twice as large as those of the true probabilities want a temperature of two."""
    router = fit_router(synthetic(3, length=4), VOCAB)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCAB, size=(4000, 1))
    router.weight.mul_(2)
    router.bias.mul_(2)
    truth = (router(torch.from_numpy(ids)) / 2).softmax(1).numpy()
    label = (generator.random((4000, 1)) > truth.cumsum(1)).sum(1)
    # Every language weighs the same: in calibration as in this check.
    blocks = {name: ids[label == i] for i, name in enumerate(router.languages)}
    calibrated = calibrate(router, blocks, per_sequence=1)
    grid = np.linspace(0.5, 8, 400)
    logits = {i: router(torch.from_numpy(b)).numpy() for i, b in enumerate(blocks.values())}
    loss = [-sum(log_softmax(rows / t, axis=1)[:, i].mean() for i, rows in logits.items()) for t in grid]
    assert calibrated.temperature[0] == pytest.approx(grid[np.argmin(loss)], rel=0.03)
    assert (calibrated.temperature == calibrated.temperature[0]).all()


def test_a_length_without_errors_does_not_end_in_certainty():
    blocks = {"a": np.full((30, 4), 3), "b": np.full((30, 4), 7)}
    router = calibrate(fit_router(blocks, VOCAB), blocks)
    chance = router.probabilities(torch.tensor([[3, 3, 3, 3]]))[0, 0]
    assert 0.99 < chance < 1 - 1 / 1000  # 240 crops, none of them wrong


def test_calibration_refuses_other_languages():
    router = fit_router(synthetic(3), VOCAB)
    for wrong in (synthetic(2), synthetic(4), synthetic(3) | {"de": []}):
        with pytest.raises(MomeError, match="held-out sequences of each of en, fr, de"):
            calibrate(router, wrong)


# ------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_kept_of_the_sequences_alone():
    blocks = synthetic(3)
    for crops in (None, Crops(2)):
        router = fit_router(blocks, VOCAB, crops=crops)
        for row, block in zip(router.statistics, blocks.values(), strict=True):
            assert row.tolist() == np.bincount(block.ravel(), minlength=VOCAB).tolist()
        assert 1 < router.concentration.min() <= router.concentration.max() <= INDEPENDENT
    counts, labels = labelled(blocks, VOCAB)
    vectorizer = TokenTfidf().fit(counts)
    model = LogisticRegression().fit(vectorizer.transform(counts), labels)
    assert from_sklearn(vectorizer, model, LANGUAGES[:3]).statistics.sum() == 0  # a pipeline does not tell


def test_the_concentration_of_a_dirichlet_multinomial_is_found_again():
    generator, mean = np.random.default_rng(0), np.random.default_rng(1).dirichlet(np.full(VOCAB, 0.5))
    for alpha in (2.0, 20.0, 200.0):
        rows = [generator.multinomial(50, generator.dirichlet(alpha * mean)) for _ in range(1000)]
        sequences = [np.repeat(np.arange(VOCAB), row) for row in rows]
        totals, found = token_statistics(count_tokens(sequences, VOCAB))
        assert found == pytest.approx(alpha, rel=0.2) and totals.tolist() == np.sum(rows, axis=0).tolist()
    every_id_once = token_statistics(count_tokens([np.arange(VOCAB)] * 5, VOCAB))
    assert every_id_once[1] == INDEPENDENT
    assert token_statistics(count_tokens([[3], [4]], VOCAB))[1] == 0  # one token a sequence tells nothing
    assert token_statistics(count_tokens([[]], VOCAB))[1] == 0
