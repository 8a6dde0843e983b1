"""The router's bake-off: which classifier picks the language of a sequence best, and at what cost.

Cross-validation is by *topic*: all sequences of an article, and of its translations, are in one fold. Folds
over single sequences would train on the beginning of the very text they test on. Scores are precision, recall
and F1 weighted by the size of each class, as published (MoME, arXiv 2407.19610); their intervals resample
topics and, where a bake-off is repeated with other folds, count those seeds too
(see :mod:`mome_utils.intervals`).

The rows that :func:`cross_validate` returns are the raw result, one per classifier and sequence; everything
else here is computed from them. Rows of several seeds may be put together.

Shapes: ``L`` languages, ``S`` seeds, ``D`` topics, ``C`` classifiers. Scores are in points, 0 to 100.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.intervals import Interval, combine
from mome_utils.router_fit import TokenTfidf, labelled
from mome_utils.tokenization import encode

__all__ = [
    "NAMES", "PUBLISHED", "assign_folds", "bake_off", "classifiers", "confusion_counts", "cross_validate",
    "document_blocks", "f1_interval", "lead_interval", "relative_cost", "score_table", "weighted_scores",
]

DRAWS = 2000
#: Name of logistic regression on the features as released.
PUBLISHED = "logistic_regression_as_released"
#: What a reader sees for each classifier.
NAMES: Mapping[str, str] = MappingProxyType({
    "logistic_regression": "logistic regression", "sgd": "SGD", "linear_svm": "linear SVM",
    "naive_bayes": "naive Bayes", "random_forest": "random forest", "knn": "k-NN",
    PUBLISHED: "logistic regression as released",
})


def classifiers(seed: int) -> dict[str, Any]:
    """The published candidates as unfitted scikit-learn estimators with their defaults, one thread each."""
    return {
        "logistic_regression": LogisticRegression(max_iter=1000),
        "sgd": SGDClassifier(random_state=seed),
        "linear_svm": LinearSVC(random_state=seed),
        "naive_bayes": MultinomialNB(),
        "random_forest": RandomForestClassifier(random_state=seed),
        "knn": KNeighborsClassifier(),
    }


def document_blocks(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], block_size: int
) -> tuple[list[np.ndarray], list[str]]:
    """Each document alone, framed ``<s> … </s>``, cut into full blocks.

    The training blocks of the study pack several documents; these never do, so that each has one topic. The
    last part of a document is dropped, unless the document is shorter than a block: then it is kept whole.

    Args:
        tokenizer: the study's tokenizer. documents: of one language. block_size: in tokens.

    Returns:
        The blocks (int32 arrays of at most ``block_size`` ids) and the topic id of each.
    """
    documents = list(documents)
    blocks: list[np.ndarray] = []
    topics: list[str] = []
    encoded = encode(tokenizer, [document.text for document in documents])
    for document, text_ids in zip(documents, encoded, strict=True):
        ids = np.array([tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id], dtype=np.int32)
        cuts = range(0, max(len(ids) - block_size, 0) + 1, block_size)
        blocks.extend(ids[start : start + block_size] for start in cuts)
        topics.extend([document.id] * len(cuts))
    return blocks, topics


def assign_folds(topics: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Fold of each topic: a seeded permutation dealt out in turn, so that fold sizes differ by one at most.

    Raises:
        MomeError: fewer than two folds, or fewer topics than folds.
    """
    names = sorted(set(topics))
    if not 2 <= folds <= len(names):
        raise MomeError(
            f"{len(names)} topics cannot be dealt into {folds} folds: use two or more, at most one a topic."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[index]: place % folds for place, index in enumerate(order.tolist())}


def cross_validate(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], vocab_size: int, *,
    estimators: Mapping[str, Any], folds: int = 5, seed: int = 0, published_tokens: bool = False,
) -> pd.DataFrame:
    """Fit and test each classifier on every fold; the features too are fitted on the training folds only.

    Args:
        blocks: token sequences of each language. topics: the topic of each, in the same order.
        vocab_size: number of token ids.
        estimators: unfitted classifiers by name, see :func:`classifiers`.
        folds: number of folds. seed: of the folds (give estimators the same).
        published_tokens: leave out the ids 0 to 9, see :class:`~mome_utils.router_fit.TokenTfidf`.

    Returns:
        Rows (seed, classifier, fold, topic, language, sequence, predicted, fit_seconds, predict_seconds), one
        per classifier and sequence; ``sequence`` counts within the language. The seconds are those of the
        classifier on the whole fold, features excluded, since they are the same for all.

    Raises:
        MomeError: too few languages or topics, or topics that do not match the blocks.
    """
    languages = tuple(blocks)
    if len(languages) < 2:
        raise MomeError("A bake-off needs the text of two or more languages.")
    uneven = [language for language in languages if len(blocks[language]) != len(topics[language])]
    if uneven:
        raise MomeError(f"The language '{uneven[0]}' has not one topic per sequence: use document_blocks.")
    counts, labels = labelled(blocks, vocab_size)
    topic = np.concatenate([np.asarray(topics[language], dtype=object) for language in languages])
    fold_of = assign_folds(topic.tolist(), folds, seed)
    fold = np.array([fold_of[name] for name in topic], dtype=np.int64)
    names = np.array(languages, dtype=object)
    sequence = np.concatenate([np.arange(len(sequences)) for sequences in blocks.values()])
    rows = []
    for held_out in range(folds):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        if len(np.unique(labels[train])) < len(languages):
            raise MomeError(
                "A language has all its topics in one fold: give it more documents or use fewer folds."
            )
        vectorizer = TokenTfidf(published_tokens=published_tokens).fit(counts[train])
        features, unseen = vectorizer.transform(counts[train]), vectorizer.transform(counts[test])
        for name, estimator in estimators.items():
            key = {"seed": seed, "classifier": name, "fold": held_out}
            model = clone(estimator)
            start = perf_counter()
            model.fit(features, labels[train])
            fitted = perf_counter()
            predicted = model.predict(unseen)
            seconds = {"fit_seconds": fitted - start, "predict_seconds": perf_counter() - fitted}
            rows.append(pd.DataFrame(key | {
                "topic": topic[test], "language": names[labels[test]], "sequence": sequence[test],
                "predicted": names[predicted], **seconds,
            }))
    return pd.concat(rows, ignore_index=True)


def bake_off(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], vocab_size: int, *,
    seeds: Sequence[int], folds: int = 5,
) -> pd.DataFrame:
    """:func:`cross_validate` of all :func:`classifiers`, once per seed, each time with other folds.

    The rows also hold :data:`PUBLISHED`, logistic regression on the release's features, without ids 0 to 9.
    """
    parts = []
    for seed in seeds:
        estimators = classifiers(seed)
        released = {PUBLISHED: estimators["logistic_regression"]}
        for chosen, dropped in ((estimators, False), (released, True)):
            parts.append(cross_validate(
                blocks, topics, vocab_size, estimators=chosen, folds=folds, seed=seed,
                published_tokens=dropped,
            ))
    return pd.concat(parts, ignore_index=True)


def confusion_counts(rows: pd.DataFrame, languages: Sequence[str], by: Sequence[str] = ()) -> np.ndarray:
    """Number of sequences by true and predicted language.

    Args:
        rows: with columns language, predicted and those of ``by``.
        languages: the order of rows and columns.
        by: columns to count apart.

    Returns:
        [*number of values of each column of ``by`` (sorted), L (true), L (predicted)], int64.
    """
    columns = [pd.factorize(rows[column], sort=True) for column in by]
    place = {language: index for index, language in enumerate(languages)}
    truth = rows["language"].map(place).to_numpy(dtype=np.int64)
    guess = rows["predicted"].map(place).to_numpy(dtype=np.int64)
    counts = np.zeros((*(len(values) for _, values in columns), len(place), len(place)), dtype=np.int64)
    np.add.at(counts, (*(codes for codes, _ in columns), truth, guess), 1)
    return counts


def weighted_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of confusion counts, weighted by the size of each true class.

    Args:
        counts: [..., L, L], true by predicted.

    Returns:
        ``precision``, ``recall``, ``f1``, each [...], in points; a class never predicted has precision 0, as
        in scikit-learn's ``average="weighted", zero_division=0``.
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    true, guessed = counts.sum(-1), counts.sum(-2)

    def mean(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        ratio = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        return np.asarray(100 * (ratio * true).sum(-1) / np.maximum(true.sum(-1), 1))

    harmonic = mean(2 * hits, true + guessed)
    return {"precision": mean(hits, guessed), "recall": mean(hits, true), "f1": harmonic}


def f1_interval(rows: pd.DataFrame, classifier: str) -> Interval:
    """Weighted F1 of one classifier, in points, with a 95 % interval over topics and seeds.

    Where not one sequence is wrong, resampling finds no spread although another sample could hold an error.
    The lower limit is then the rule of three (Hanley & Lippman-Hand 1983): 3 errors among as many sequences.
    """
    point, sampled, at, topics = _resampled_f1(rows, classifier)
    found = combine(point[:, at], sampled[:, :, at], documents=topics)
    low = found.estimate - _rule_of_three(rows) if found.low == found.high else found.low
    return replace(found, low=low, high=min(found.high, 100.0))


def lead_interval(rows: pd.DataFrame, classifier: str) -> Interval:
    """F1 of a classifier minus that of the best other, in points, with a 95 % interval over topics and seeds.

    Which of the others is best is decided anew in every resample, since that choice is uncertain too. Where
    the two never differ the limits are the rule of three's, as in :func:`f1_interval`.
    """
    if rows["classifier"].nunique() < 2:
        raise MomeError("A lead needs two classifiers or more: add another one to the bake-off.")
    point, sampled, at, topics = _resampled_f1(rows, classifier)

    def lead(scores: np.ndarray) -> np.ndarray:
        return np.asarray(scores[..., at] - np.delete(scores, at, axis=-1).max(-1))

    found = combine(lead(point), lead(sampled), documents=topics)
    half = _rule_of_three(rows) if found.low == found.high else 0.0
    return replace(found, low=found.low - half, high=found.high + half)


def _rule_of_three(rows: pd.DataFrame) -> float:
    """Upper 95 % limit of the share of errors when none was seen, in points."""
    return 300 / (len(rows) / (rows["classifier"].nunique() * rows["seed"].nunique()))


def _position(names: Sequence[str], classifier: str) -> int:
    if classifier not in names:
        raise MomeError(f"The bake-off holds no classifier '{classifier}': it has {', '.join(names)}.")
    return list(names).index(classifier)


def _resampled_f1(rows: pd.DataFrame, classifier: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """F1 [S, C], F1 with topics drawn with replacement [draws, S, C], the classifier's place in C, and D."""
    at = _position(sorted(rows["classifier"].unique()), classifier)
    counts = confusion_counts(rows, sorted(rows["language"].unique()), ["topic", "seed", "classifier"])
    topics = len(counts)
    weights = np.random.default_rng(0).multinomial(topics, np.full(topics, 1 / topics), size=DRAWS)
    drawn = (weights.astype(float) @ counts.reshape(topics, -1)).reshape(DRAWS, *counts.shape[1:])
    return weighted_scores(counts.sum(0))["f1"], weighted_scores(drawn)["f1"], at, topics


def score_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per classifier, best F1 first: precision, recall, f1, low, high (of F1), all in points."""
    languages, table = sorted(rows["language"].unique()), []
    for name in rows["classifier"].unique():
        own = rows[rows["classifier"] == name]
        scores = weighted_scores(confusion_counts(own, languages, ["seed"]))
        limits = f1_interval(own, name)
        means = {score: float(values.mean()) for score, values in scores.items()}
        table.append({"classifier": name} | means | {"low": limits.low, "high": limits.high})
    return pd.DataFrame(table).sort_values("f1", ascending=False, kind="stable", ignore_index=True)


def relative_cost(rows: pd.DataFrame, baseline: str = "logistic_regression") -> pd.DataFrame:
    """Fit and predict time of each classifier as ratios to ``baseline`` in the same fold (median over folds).

    Returns:
        Rows (classifier, fit_ratio, predict_ratio). Ratios travel between machines, seconds do not.
    """
    folds = rows.drop_duplicates(["seed", "fold", "classifier"])
    ratios = {}
    for name in ("fit", "predict"):
        table = folds.pivot_table(index=["seed", "fold"], columns="classifier", values=f"{name}_seconds")
        _position(list(table.columns), baseline)
        ratios[f"{name}_ratio"] = table.div(table[baseline], axis=0).median()
    return pd.DataFrame(ratios).rename_axis("classifier").reset_index()
