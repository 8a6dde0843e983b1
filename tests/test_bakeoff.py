"""The bake-off: honest folds, exact features, right scores, intervals and sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import precision_recall_fscore_support
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC

from mome_utils import bakeoff_models
from mome_utils.bakeoff import (
    FEATURE_NAMES,
    NAMES,
    PUBLISHED,
    assign_folds,
    bake_off,
    classifiers,
    confusion_counts,
    cost_table,
    cross_validate,
    document_blocks,
    expert_rows,
    f1_interval,
    lead_interval,
    macro_scores,
    relative_cost,
    score_table,
    weighted_scores,
)
from mome_utils.bakeoff_models import (
    SEQUENCE,
    Features,
    TransformerClassifier,
    character_features,
    cheap_classifiers,
    decode_sequences,
    expert_losses,
    feature_sets,
    fitted_bytes,
    pair_features,
    sequence_features,
    settings_of,
    token_features,
)
from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document, load_corpus
from mome_utils.models import build_gpt2, parameter_count
from mome_utils.router_fit import TokenTfidf, labelled
from mome_utils.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60
checked = partial(settings, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def real():
    """A tokenizer, and the block sequences and topics of a slice of the embedded corpus."""
    corpus = load_corpus("embedded", topics=16, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 700)
    cut = {name: document_blocks(tokenizer, corpus.of_language(name), 64) for name in corpus.languages}
    return tokenizer, {k: v[0][:70] for k, v in cut.items()}, {k: v[1][:70] for k, v in cut.items()}


# --- folds and blocks ---------------------------------------------------------------------------------------


@checked(max_examples=40)
@given(st.sets(st.text(min_size=1, max_size=6), min_size=2, max_size=40), st.integers(0, 5), st.data())
def test_every_topic_has_one_fold_and_folds_have_like_sizes(topics, seed, data):
    folds = data.draw(st.integers(2, len(topics)))
    chosen = assign_folds([*topics, *topics], folds, seed)
    sizes = pd.Series(chosen).value_counts()
    assert set(chosen) == topics and len(sizes) == folds and sizes.max() - sizes.min() <= 1


def test_folds_never_share_a_topic_not_even_between_languages(real):
    _, blocks, topics = real
    rows = cross_validate(blocks, topics, 700, estimators={"svm": LinearSVC(random_state=0)}, folds=4, seed=1)
    assert (rows.groupby("topic")["fold"].nunique() == 1).all()
    assert len(rows) == sum(map(len, blocks.values()))
    assert rows["language"].value_counts().to_dict() == {k: len(v) for k, v in blocks.items()}
    assert weighted_scores(confusion_counts(rows, list(blocks)))["f1"] > 95


@pytest.mark.parametrize("features", [None, pair_features(VOCAB, bits=20)], ids=["tokens", "pairs"])
def test_a_classifier_is_never_fitted_on_a_topic_it_is_tested_on(features):
    """One id per topic: were a topic on both sides, nearest neighbours would know every answer."""
    topics = {name: [f"t{i // 4}" for i in range(80)] for name in ("a", "b")}
    blocks = {name: [[side + 2 * (i // 4)] * 3 for i in range(80)] for side, name in enumerate(topics)}
    knn = {"knn": classifiers(0)["knn"]}
    rows = cross_validate(blocks, topics, VOCAB, estimators=knn, folds=5, features=features)
    assert rows["predicted"].nunique() == 1  # nothing known: every sequence gets the same answer
    leaky = TokenTfidf().fit(labelled(blocks, VOCAB)[0])
    assert len(leaky.tokens_) == 40


def test_document_blocks_are_full_and_keep_only_whole_short_documents(real):
    tokenizer = real[0]
    texts = {"long": "word " * 300, "short": "one two", "exact": ""}
    documents = [Document(name, "en", "", "", text) for name, text in texts.items()]
    blocks, topics = document_blocks(tokenizer, documents, 32)
    sizes = {name: [len(b) for b, t in zip(blocks, topics, strict=True) if t == name] for name in texts}
    assert set(sizes["long"]) == {32} and len(sizes["long"]) > 5
    assert len(sizes["short"]) == 1 and sizes["short"][0] < 32 and sizes["exact"] == [2]
    joined = np.concatenate([b for b, t in zip(blocks, topics, strict=True) if t == "long"])
    assert joined[0] == tokenizer.bos_token_id
    assert texts["long"].startswith(tokenizer.decode(joined[1:].tolist()))
    assert document_blocks(tokenizer, [], 32) == ([], [])
    full, of = document_blocks(tokenizer, documents, 32, full_only=True)
    assert set(map(len, full)) == {32} and set(of) == {"long"} and len(full) == len(sizes["long"])
    assert document_blocks(tokenizer, documents[2:], 2, full_only=True)[1] == ["exact"]  # exactly one block


def test_cross_validation_refuses_what_it_cannot_do():
    blocks, topics = {"a": [[1], [2]], "b": [[3], [4]]}, {"a": ["x", "y"], "b": ["x", "y"]}
    chosen = {"nb": classifiers(0)["naive_bayes"]}
    with pytest.raises(MomeError, match="2 topics cannot be dealt into 3 folds"):
        cross_validate(blocks, topics, VOCAB, estimators=chosen, folds=3)
    with pytest.raises(MomeError, match="two or more languages"):
        cross_validate({"a": blocks["a"]}, topics, VOCAB, estimators=chosen)
    with pytest.raises(MomeError, match="'b' has not one topic per sequence"):
        cross_validate(blocks, topics | {"b": ["x"]}, VOCAB, estimators=chosen)
    with pytest.raises(MomeError, match="all its topics in one fold"):
        cross_validate(blocks, topics | {"a": ["x", "x"]}, VOCAB, estimators=chosen, folds=2)


# --- features -----------------------------------------------------------------------------------------------


@checked(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=5))
def test_pairs_are_counted_like_a_dictionary_of_pairs(sequences):
    """With so many columns that the few pairs of ten ids do not meet, columns are pairs one to one."""
    counts = pair_features(10, bits=24).extract(sequences)
    every = pair_features(10, bits=24).extract([[a, b] for a in range(10) for b in range(10)])
    column = {(a, b): every[10 * a + b, 10:].indices[0] + 10 for a in range(10) for b in range(10)}
    assert len(set(column.values())) == 100 and counts.shape == (len(sequences), 10 + 2**24)
    for row, sequence in enumerate(sequences):
        expected: dict[int, int] = {}
        for key in [*sequence, *(column[pair] for pair in zip(sequence[:-1], sequence[1:], strict=True))]:
            expected[key] = expected.get(key, 0) + 1
        found = counts[row]
        assert dict(zip(found.indices.tolist(), found.data.tolist(), strict=True)) == expected


def test_hashed_pairs_stay_inside_their_columns_and_spread_over_them():
    """Of 5,000 different pairs in 2 ** 12 columns, random hashing would fill 1 - exp(-5000 / 4096) = 70 %."""
    generator = np.random.default_rng(0)
    sequence = generator.permutation(5001)
    counts = pair_features(6000, bits=12).extract([sequence])
    pairs = counts[0, 6000:]
    assert counts.shape == (1, 6000 + 4096) and pairs.sum() == 5000
    assert pairs.nnz == pytest.approx(4096 * 0.705, rel=0.05)


def test_characters_are_counted_in_the_decoded_text(real):
    tokenizer = real[0]
    ids = tokenizer("Bär, bar", add_special_tokens=False)["input_ids"]
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert decode_sequences(tokenizer, [framed, np.array(ids, dtype=np.int32)]) == ["Bär, bar"] * 2
    counts = character_features(tokenizer, longest=2, bits=20).extract([framed, ids[:0]])
    grams = list("Bär, bar") + [a + b for a, b in zip("Bär, ba", "är, bar", strict=True)]
    assert counts.shape == (2, 2**20) and counts[0].sum() == len(grams) == 15
    assert counts[0].nnz == len(set(grams)) and counts[1].nnz == 0  # "B" and "b" are two; "r" counts twice
    assert sorted(counts[0].data.tolist()) == sorted(grams.count(gram) for gram in set(grams))


def test_sequences_in_order_are_padded_with_a_mark_that_is_no_id():
    table = sequence_features().extract([[5, 0], [], np.array([7, 8, 9])])
    assert table.dtype == np.int32 and table.tolist() == [[5, 0, -1], [-1, -1, -1], [7, 8, 9]]


def test_every_set_of_features_has_a_name_for_readers_and_keeps_the_order_of_sequences(real):
    tokenizer, blocks, _ = real
    some = blocks["en"][:3] + blocks["py"][:2]
    for features in feature_sets(tokenizer, 700):
        assert features.name in FEATURE_NAMES
        one, all_ = features.extract(some[3:4]), features.extract(some)
        assert all_.shape[0] == 5
        same = (all_[3] != one[0]).nnz == 0 if sp.issparse(one) else (all_[3] == one[0]).all()
        assert same, features.name


# --- classifiers --------------------------------------------------------------------------------------------


def test_cross_validation_repeats_exactly_and_by_seed(real):
    _, blocks, topics = real
    chosen = {name: classifiers(3)[name] for name in ("sgd", "naive_bayes", "gradient_boosting", "mlp")}
    runs = [cross_validate(blocks, topics, 700, estimators=chosen, folds=2, seed=s) for s in (3, 3, 4)]
    first, second, other = (run.drop(columns=["fit_seconds", "predict_seconds"]) for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert not first["fold"].equals(other["fold"])
    assert f1_interval(pd.concat(runs[1:], ignore_index=True), "sgd").seeds == 2


def test_the_bake_off_tests_every_entry_on_every_sequence(real, monkeypatch):
    tokenizer, blocks, topics = real
    short = TransformerClassifier(vocab_size=700, shape=Shape(1, 16, 1), steps=3)
    monkeypatch.setattr("mome_utils.bakeoff.reading_classifiers", lambda seed, vocab: {"transformer": short})
    few = {name: sequences[:30] for name, sequences in blocks.items()}
    rows = bake_off(few, {name: topics[name][:30] for name in few}, 700, tokenizer=tokenizer, seeds=(0, 1), folds=2)
    entries = set(rows.groupby(["features", "classifier"]).groups)
    counted = ("tokens", PUBLISHED, "token_pairs", "characters")
    assert entries == {(f, c) for f in counted for c in cheap_classifiers(0)} | {
        ("tokens", c) for c in classifiers(0)
    } | {(SEQUENCE, "transformer")}
    assert {c for _, c in entries} <= set(NAMES)
    assert not rows.duplicated(["seed", "features", "classifier", "language", "sequence"]).any()
    assert len(rows) == 2 * len(entries) * sum(map(len, few.values()))
    first = rows.iloc[0]
    assert topics[first["language"]][first["sequence"]] == first["topic"]
    costs = cost_table(rows).merge(relative_cost(rows)).set_index(["features", "classifier"])
    assert len(costs) == len(entries) and (costs[["fit_seconds", "microseconds", "size_bytes"]] > 0).all(axis=None)
    assert costs.loc[("tokens", "random_forest"), "settings"] == "RandomForestClassifier(n_estimators=30)"
    assert costs.loc[("tokens", "logistic_regression"), ["fit_ratio", "predict_ratio"]].tolist() == [1, 1]
    # What the fold's time does not depend on: which of its rows somebody looks at.
    pd.testing.assert_frame_equal(cost_table(rows[rows["language"] == "fr"]), cost_table(rows))


def test_the_transformer_learns_what_needs_order_and_depends_on_its_seed_alone():
    """Two classes with the same ids: 1 2 1 2 … and 2 1 2 1 …, in sequences of uneven length."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    table = sequence_features().extract([[1 + (i + label) % 2 for i in range(generator.integers(3, 9))]
                                         for label in labels])
    known = np.array(["x", "y"])[labels]
    make = partial(TransformerClassifier, vocab_size=4, shape=Shape(1, 16, 2), steps=80, learning_rate=1e-2)
    for pooling in ("mean", "last"):
        before = torch.random.get_rng_state()
        model = make(pooling=pooling).fit(table[:120], known[:120])
        assert torch.equal(before, torch.random.get_rng_state())
        assert (model.predict(table[120:]) == known[120:]).mean() > 0.95, pooling
        cut = [row[: (row >= 0).sum()] for row in table[120:140]]  # without padding, one by one
        assert model.predict(table[120:140]).tolist() == [model.predict(row[None])[0] for row in cut]
    fitted = [make(steps=4, random_state=seed).fit(table, known) for seed in (0, 0, 1)]
    weights = [[p.detach() for p in model.network_.parameters()] for model in fitted]
    assert all(map(torch.equal, weights[0], weights[1])) and not all(map(torch.equal, weights[0], weights[2]))
    with pytest.raises(MomeError, match="pooled by 'max'"):
        make(pooling="max").fit(table, known)


def test_sizes_are_those_of_the_arrays_that_prediction_reads():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    counts = sp.csr_matrix(generator.poisson(0.5 + labels[:, None] % 2, size=(60, 40)).astype(float))
    fitted = {name: model.fit(counts, labels) for name, model in classifiers(0).items()}
    for name in ("logistic_regression", "sgd", "linear_svm", "naive_bayes"):
        assert fitted_bytes(fitted[name]) == 8 * 3 * (40 + 1), name
    assert fitted_bytes(fitted["knn"]) == 12 * counts.nnz + 4 * 61 + 8 * 60
    assert fitted_bytes(fitted["mlp"]) == 8 * (40 * 32 + 32 + 32 * 3 + 3)
    assert fitted_bytes(TokenTfidf().fit(counts)) == 2 * 8 * 40
    nodes = sum(tree.tree_.node_count for tree in fitted["random_forest"].estimators_)
    assert fitted_bytes(fitted["random_forest"]) == nodes * (64 + 8 * 3)
    small = RandomForestClassifier(10, random_state=0).fit(counts, labels)
    assert fitted_bytes(small) < fitted_bytes(fitted["random_forest"]) / 2
    boosting = fitted["gradient_boosting"]
    assert fitted_bytes(boosting) > fitted_bytes(boosting.steps[0][1]) == 8 * 32 * 40
    reader = TransformerClassifier(vocab_size=30, shape=Shape(1, 8, 1), steps=1)
    reader.fit(np.ones((4, 6), dtype=np.int32), np.array([0, 1, 2, 0]))
    assert fitted_bytes(reader) == 4 * (parameter_count(reader.network_.trunk) + 3 * (8 + 1))
    assert fitted_bytes(None) == 0
    unknown = GaussianNB().fit(counts.toarray(), labels)  # means, variances, priors, counts and labels
    assert fitted_bytes(unknown) == 8 * (2 * 3 * 40 + 3 * 3)


def test_settings_name_what_differs_from_the_defaults_and_not_the_seed():
    named = {name: settings_of(model) for name, model in classifiers(7).items()}
    assert named == {name: settings_of(model) for name, model in classifiers(8).items()}
    assert named["sgd"] == "SGDClassifier()" and "n_estimators=30" in named["random_forest"]
    assert named["gradient_boosting"].startswith("TruncatedSVD(n_components=32), then HistGradientBoosting")
    reader = settings_of(TransformerClassifier(vocab_size=9, shape=Shape(1, 32, 2), steps=200, random_state=4))
    assert "steps=200" in reader and "layers=1, width=32" in reader and "random_state" not in reader


# --- experts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts():
    """Untrained models are experts too: what they prefer is arbitrary, but fixed."""
    make = partial(build_gpt2, Shape(1, 16, 2), vocab_size=40, block_size=24, bos=1, eos=2)
    return {"a": make(seed=0), "b": make(seed=1), "c": make(seed=2)}


def test_expert_losses_are_sums_of_next_id_losses_whatever_the_padding_and_batches(experts, monkeypatch):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 40, size=n) for n in (24, 2, 11, 5, 24, 3)]
    losses = expert_losses(experts, sequences)
    assert losses.shape == (6, 3) and losses.dtype == np.float64
    for column, model in enumerate(experts.values()):
        for row, sequence in enumerate(sequences):
            ids = torch.from_numpy(sequence)[None]
            with torch.no_grad():  # transformers' own loss is the mean over the targets
                mean = model(input_ids=ids, labels=ids).loss.item()
            assert losses[row, column] == pytest.approx(mean * (len(sequence) - 1), rel=1e-5)
    monkeypatch.setattr(bakeoff_models, "MOST_LOGITS", 1)
    np.testing.assert_allclose(expert_losses(experts, sequences), losses, rtol=1e-6)


def test_the_lowest_loss_of_the_prefix_wins(experts):
    generator = np.random.default_rng(1)
    blocks = {name: [generator.integers(0, 40, size=20) for _ in range(12)] for name in experts}
    topics = {name: [f"t{i // 2}" for i in range(12)] for name in experts}
    for length in (2, 7, 24):
        rows = expert_rows(experts, blocks, topics, length=length, seed=4)
        prefixes = [sequence[:length] for part in blocks.values() for sequence in part]
        best = expert_losses(experts, prefixes).argmin(1)
        assert rows["predicted"].tolist() == [list(experts)[i] for i in best]
        assert rows["topic"].tolist() == [topic for name in experts for topic in topics[name]]
        assert set(rows["length"]) == {length} and set(rows["seed"]) == {4}
        assert set(rows["size_bytes"]) == {4 * sum(map(parameter_count, experts.values()))}
        assert len(score_table(rows)) == 1 and len(cost_table(rows)) == 1
    with pytest.raises(MomeError, match="prefix of 1 ids"):
        expert_rows(experts, blocks, topics, length=1)
    with pytest.raises(MomeError, match="one for each language"):
        expert_rows({"a": experts["a"], "b": experts["b"]}, blocks, topics, length=4)
    with pytest.raises(MomeError, match="two ids or more"):
        expert_losses(experts, [[3, 4], [5]])
    with pytest.raises(MomeError, match="two or more"):
        expert_losses({"a": experts["a"]}, [[3, 4]])


# --- scores and intervals -----------------------------------------------------------------------------------


@checked(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=60))
def test_scores_equal_scikit_learn(pairs):
    truth, guess = zip(*pairs, strict=True)
    counts = confusion_counts(pd.DataFrame({"language": truth, "predicted": guess}), list("abcd"))
    for average, ours, labels in (
        ("weighted", weighted_scores(counts), list("abcd")), ("macro", macro_scores(counts), sorted(set(truth))),
    ):
        expected = precision_recall_fscore_support(truth, guess, labels=labels, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
            assert ours[name] == pytest.approx(100 * value), average


def outcome(errors: dict[str, set[str]], topics: int = 50, per_topic: int = 4, seed: int = 0) -> pd.DataFrame:
    """Rows of a made-up bake-off: each classifier takes one 'fr' block of some topics for 'en'."""
    rows = [
        {
            "seed": seed, "features": "tokens", "fold": 0, "classifier": name, "topic": f"t{topic}",
            "language": language, "predicted": "en" if i == 0 and f"t{topic}" in wrong else language,
            "fit_seconds": 2.0 if name == "logistic_regression" else 6.0, "predict_seconds": 0.5,
            "size_bytes": 100, "settings": "",
        }
        for name, wrong in errors.items()
        for topic in range(topics) for language in ("en", "fr") for i in range(per_topic if language == "fr" else 2)
    ]
    return pd.DataFrame(rows)


def test_intervals_on_a_hand_case():
    """10 of 50 topics hold one wrong block of 6: recall of fr is 190/200, precision of en 100/110."""
    rows = outcome({"sgd": {f"t{i}" for i in range(10)}})
    en, fr = 2 * 100 / (100 + 110), 2 * 190 / (190 + 200)
    row = score_table(rows).iloc[0]
    assert row["f1"] == pytest.approx(100 * (en * 100 + fr * 200) / 300)
    assert row["macro_f1"] == pytest.approx(100 * (en + fr) / 2)
    assert row["recall"] == pytest.approx(100 * 290 / 300) and row["macro_recall"] == pytest.approx(97.5)
    limits = f1_interval(rows, "sgd")
    assert (limits.estimate, limits.low, limits.high) == pytest.approx((row["f1"], row["low"], row["high"]))
    assert (limits.seeds, limits.documents) == (1, 50)
    # An independent bootstrap over topics, with scikit-learn's scores.
    generator, draws = np.random.default_rng(1), []
    codes = rows[["language", "predicted"]].eq("fr").to_numpy().reshape(50, 6, 2)
    for _ in range(200):
        truth, guess = codes[generator.integers(50, size=50)].reshape(-1, 2).T
        weighted = precision_recall_fscore_support(truth, guess, average="weighted")
        macro = precision_recall_fscore_support(truth, guess, average="macro")
        draws.append([weighted[2], weighted[0], macro[2], macro[1]])
    for name, spread in zip(("f1", "precision", "macro_f1", "macro_recall"), np.std(draws, axis=0), strict=True):
        assert (row[f"{name}_high"] - row[f"{name}_low"]) / 2 == pytest.approx(2.01 * 100 * spread, rel=0.2)


def test_faultless_entries_have_a_width_that_counts_topics_not_blocks():
    """Blocks of a topic err together: with ten times the blocks of as many topics nothing more is known."""
    for per_topic in (4, 40):
        rows = outcome({"logistic_regression": set(), "sgd": set()}, per_topic=per_topic)
        limits, lead = f1_interval(rows, "sgd"), lead_interval(rows, "logistic_regression")
        assert (limits.estimate, limits.high) == (100, 100) and limits.low == pytest.approx(100 - 300 / 50)
        assert lead.estimate == 0 and lead.low == -lead.high == pytest.approx(-300 / 50)
        row = score_table(rows).iloc[0]
        assert row["macro_recall_low"] == pytest.approx(94) and row["macro_recall_high"] == 100
    few = f1_interval(outcome({"sgd": set()}, topics=2), "sgd")
    assert (few.low, few.high) == (0, 100)


def test_lead_is_to_the_best_of_the_others():
    few, many = {f"t{i}" for i in range(5)}, {f"t{i}" for i in range(25)}
    rows = outcome({"logistic_regression": few, "sgd": many, "knn": set()})
    lead = lead_interval(rows, "logistic_regression")
    table = score_table(rows)
    assert list(table["classifier"]) == ["knn", "logistic_regression", "sgd"]
    assert lead.estimate == pytest.approx(table["f1"][1] - 100) and lead.high < 0
    assert lead_interval(rows, "knn").low > 0
    cost = relative_cost(rows).set_index("classifier")
    assert cost.loc["sgd", "fit_ratio"] == 3 and cost.loc["logistic_regression", "fit_ratio"] == 1
    with pytest.raises(MomeError, match="no classifier 'mlp'"):
        f1_interval(rows, "mlp")
    with pytest.raises(MomeError, match="two classifiers"):
        lead_interval(rows[rows["classifier"] == "knn"], "knn")


def test_an_entry_is_a_classifier_with_its_features():
    good = outcome({"sgd": set(), "knn": {"t1"}})
    bad = outcome({"sgd": {f"t{i}" for i in range(20)}}).assign(features="characters")
    rows = pd.concat([bad, good], ignore_index=True)
    assert f1_interval(rows, "sgd").estimate == 100  # of tokens, where nothing else is said
    assert f1_interval(rows, "sgd", "characters").estimate < 96
    assert lead_interval(rows, "sgd", "characters").estimate < -4 < 0 < lead_interval(rows, "sgd").estimate
    table = score_table(rows)
    assert list(zip(table["features"], table["classifier"], strict=True)) == [
        ("tokens", "sgd"), ("tokens", "knn"), ("characters", "sgd")
    ]
    with pytest.raises(MomeError, match="no classifier 'knn' of characters: it has sgd of characters, knn of tokens"):
        f1_interval(rows, "knn", "characters")
    unnamed = good.drop(columns="features")  # rows of one kind need not name it
    assert f1_interval(unnamed, "knn") == f1_interval(good, "knn")


def test_entries_that_were_tested_apart_have_no_lead_but_keep_their_own_scores():
    rows = pd.concat([outcome({"sgd": {"t3"}}), outcome({"sgd": {"t3"}}, seed=1),
                      outcome({"experts": {"t1"}}, topics=10)], ignore_index=True)
    with pytest.raises(MomeError, match="not tested on the same sequences"):
        lead_interval(rows, "sgd")
    table = score_table(rows).set_index("classifier")
    assert table.loc["experts", "recall"] == pytest.approx(100 * 59 / 60)
    alone = score_table(rows[rows["classifier"] == "sgd"]).iloc[0]
    pd.testing.assert_series_equal(table.loc["sgd"], alone.drop("classifier"), check_names=False)


def test_a_label_that_is_only_predicted_is_an_error_and_no_class():
    rows = outcome({"sgd": set()})
    rows.loc[rows["topic"] == "t7", "predicted"] = "other"
    row = score_table(rows).iloc[0]
    assert row["recall"] == row["macro_recall"] == pytest.approx(98) and row["precision"] == 100


def test_features_that_are_new_run_through_the_same_folds(real):
    """A reader's own idea: the share of each sequence's distinct ids, one column, no weighting."""
    _, blocks, topics = real
    own = Features("distinct", lambda sequences: np.array([[len(set(s.tolist())) / len(s)] for s in sequences]))
    rows = cross_validate(blocks, topics, 700, estimators={"nb": GaussianNB()}, features=own, folds=2)
    same = cross_validate(blocks, topics, 700, estimators={"nb": cheap_classifiers(0)["naive_bayes"]}, folds=2,
                          features=token_features(700))
    assert set(rows["features"]) == {"distinct"} and set(rows["size_bytes"]) == {8 * 4 * 5}
    pd.testing.assert_series_equal(rows["fold"], same["fold"])
    assert score_table(pd.concat([rows, same]))["features"].tolist() == ["tokens", "distinct"]
