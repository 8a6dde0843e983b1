"""The bake-off: honest folds, scores equal to scikit-learn's, intervals that cover topics and seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from sklearn.svm import LinearSVC

from mome_utils.bakeoff import (
    NAMES,
    PUBLISHED,
    assign_folds,
    bake_off,
    classifiers,
    confusion_counts,
    cross_validate,
    document_blocks,
    f1_interval,
    lead_interval,
    relative_cost,
    score_table,
    weighted_scores,
)
from mome_utils.config import MomeError
from mome_utils.corpus import Document, load_corpus
from mome_utils.router_fit import TokenTfidf, labelled
from mome_utils.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60


@pytest.fixture(scope="module")
def real():
    """A tokenizer, and the block sequences and topics of a slice of the embedded corpus."""
    corpus = load_corpus("embedded", topics=24, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 700)
    cut = {name: document_blocks(tokenizer, corpus.of_language(name), 64) for name in corpus.languages}
    return tokenizer, {k: v[0] for k, v in cut.items()}, {k: v[1] for k, v in cut.items()}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=6), min_size=2, max_size=40), st.integers(0, 5), st.data())
def test_every_topic_has_one_fold_and_folds_have_like_sizes(topics, seed, data):
    folds = data.draw(st.integers(2, len(topics)))
    chosen = assign_folds([*topics, *topics], folds, seed)
    sizes = pd.Series(chosen).value_counts()
    assert set(chosen) == topics and len(sizes) == folds and sizes.max() - sizes.min() <= 1


def test_folds_never_share_a_topic_not_even_between_languages(real):
    _, blocks, topics = real
    rows = cross_validate(
        blocks, topics, 700, estimators={"svm": LinearSVC(random_state=0)}, folds=4, seed=1
    )
    assert (rows.groupby("topic")["fold"].nunique() == 1).all()
    assert len(rows) == sum(map(len, blocks.values()))
    assert rows["language"].value_counts().to_dict() == {k: len(v) for k, v in blocks.items()}
    assert weighted_scores(confusion_counts(rows, list(blocks)))["f1"] > 97


def test_a_classifier_is_never_fitted_on_a_topic_it_is_tested_on():
    """One id per topic: were a topic on both sides, nearest neighbours would know every answer."""
    topics = {name: [f"t{i // 4}" for i in range(80)] for name in ("a", "b")}
    blocks = {name: [[side + 2 * (i // 4)] * 3 for i in range(80)] for side, name in enumerate(topics)}
    rows = cross_validate(blocks, topics, VOCAB, estimators={"knn": classifiers(0)["knn"]}, folds=5)
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=60))
def test_scores_equal_scikit_learn(pairs):
    truth, guess = zip(*pairs, strict=True)
    counts = confusion_counts(pd.DataFrame({"language": truth, "predicted": guess}), list("abc"))
    expected = precision_recall_fscore_support(
        truth, guess, labels=list("abc"), average="weighted", zero_division=0
    )
    ours = weighted_scores(counts)
    for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
        assert ours[name] == pytest.approx(100 * value)


def outcome(errors: dict[str, set[str]], topics: int = 50, per_topic: int = 4) -> pd.DataFrame:
    """Rows of a made-up bake-off: each classifier takes one 'fr' block of some topics for 'en'."""
    rows = [
        {
            "seed": 0, "fold": 0, "classifier": name, "topic": f"t{topic}", "language": language,
            "predicted": "en" if i == 0 and f"t{topic}" in wrong else language,
            "fit_seconds": 2.0 if name == "logistic_regression" else 6.0, "predict_seconds": 0.5,
        }
        for name, wrong in errors.items()
        for topic in range(topics) for language in ("en", "fr") for i in range(per_topic)
    ]
    return pd.DataFrame(rows)


def test_f1_interval_on_a_hand_case():
    """10 of 50 topics hold one wrong block of 8: recall of fr is 190/200, precision of en 200/210."""
    rows = outcome({"sgd": {f"t{i}" for i in range(10)}})
    limits = f1_interval(rows, "sgd")
    expected = 100 * (2 * 200 / (200 + 210) + 2 * 190 / (190 + 200)) / 2
    assert limits.estimate == pytest.approx(expected)
    # An independent bootstrap over topics, with scikit-learn's F1.
    generator, parts = np.random.default_rng(1), [part for _, part in rows.groupby("topic")]
    draws = []
    for _ in range(150):
        sample = pd.concat([parts[i] for i in generator.integers(len(parts), size=len(parts))])
        counts = confusion_counts(sample, ["en", "fr"])
        draws.append(float(weighted_scores(counts)["f1"]))
    assert (limits.high - limits.low) / 2 == pytest.approx(2.01 * np.std(draws), rel=0.2)
    assert (limits.seeds, limits.documents) == (1, 50)


def test_intervals_of_faultless_classifiers_still_have_a_width():
    rows = outcome({"logistic_regression": set(), "sgd": set()})
    limits, lead = f1_interval(rows, "sgd"), lead_interval(rows, "logistic_regression")
    assert (limits.estimate, limits.high) == (100, 100) and limits.low == pytest.approx(100 - 300 / 400)
    assert lead.estimate == 0 and lead.low == -lead.high == pytest.approx(-300 / 400)


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


def test_cross_validation_repeats_exactly_and_by_seed(real):
    _, blocks, topics = real
    chosen = {name: classifiers(3)[name] for name in ("sgd", "naive_bayes")}
    runs = [cross_validate(blocks, topics, 700, estimators=chosen, folds=3, seed=s) for s in (3, 3, 4)]
    first, second, other = (run.drop(columns=["fit_seconds", "predict_seconds"]) for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert not first["fold"].equals(other["fold"])
    both = pd.concat(runs[1:], ignore_index=True)
    assert f1_interval(both, "sgd").seeds == 2 and set(classifiers(0)) >= {"logistic_regression", "knn"}


def test_the_bake_off_holds_all_classifiers_and_the_features_as_released(real):
    _, blocks, topics = real
    few = {name: sequences[:60] for name, sequences in blocks.items()}
    rows = bake_off(few, {name: topics[name][:60] for name in few}, 700, seeds=(0, 1), folds=2)
    assert set(rows["classifier"]) == {*classifiers(0), PUBLISHED} == set(NAMES)
    per_run = rows.groupby(["seed", "classifier"])[["language", "sequence"]].apply(lambda r: r.duplicated().any())
    assert len(per_run) == 14 and not per_run.any()
    first = rows.iloc[0]
    assert topics[first["language"]][first["sequence"]] == first["topic"]


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
