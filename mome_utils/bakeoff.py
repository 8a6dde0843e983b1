"""The router's bake-off: which classifier of which features picks the language best, and at what cost.

Cross-validation is by *topic*: all sequences of an article, and of its translations, are in one fold. Folds
over single sequences would train on the beginning of the very text they test on.

The rows that :func:`cross_validate` returns are the raw result, one per classifier and sequence. Scores,
intervals and costs are computed from them in :mod:`mome_utils.bakeoff_scores`, whose functions are offered here
too. Rows of several seeds, and of other sources (:func:`expert_rows`, :mod:`mome_utils.peers`), may be put
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from mome_utils.bakeoff_models import (
    PUBLISHED,
    SEQUENCE,
    TOKENS,
    Features,
    cheap_classifiers,
    costly_classifiers,
    expert_losses,
    feature_sets,
    fitted_bytes,
    reading_classifiers,
    settings_of,
    token_features,
)
from mome_utils.bakeoff_scores import (
    FEATURE_NAMES,
    NAMES,
    confusion_counts,
    cost_table,
    f1_interval,
    lead_interval,
    macro_scores,
    relative_cost,
    score_table,
    weighted_scores,
)
from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.tokenization import encode

__all__ = [
    "FEATURE_NAMES", "NAMES", "PUBLISHED", "Spread", "assign_folds", "bake_off", "classifiers", "confusion_counts",
    "cost_table", "cross_validate", "cut_blocks", "document_blocks", "expert_rows", "f1_interval",
    "framed_documents", "in_turn", "lead_interval", "macro_scores", "relative_cost", "score_table", "weighted_scores",
]


def classifiers(seed: int) -> dict[str, Any]:
    """All candidates that take counted features, as unfitted scikit-learn estimators."""
    return cheap_classifiers(seed) | costly_classifiers(seed)


def document_blocks(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], block_size: int, *, full_only: bool = False
) -> tuple[list[np.ndarray], list[str]]:
    """Each document alone, framed ``<s> … </s>``, cut into full blocks.

    The training blocks of the study pack several documents; these never do, so that each has one topic. The
    last part of a document is dropped, unless the document is shorter than a block: then it is kept whole.

    Args:
        tokenizer: the study's tokenizer. documents: of one language. block_size: in tokens.
        full_only: drop documents shorter than a block too, for statements about full blocks.

    Returns:
        The blocks (int32 arrays of at most ``block_size`` ids) and the topic id of each.
    """
    documents = list(documents)
    framed = framed_documents(tokenizer, documents)
    if full_only:
        documents = [document for document, ids in zip(documents, framed, strict=True) if len(ids) >= block_size]
        framed = [ids for ids in framed if len(ids) >= block_size]
    return cut_blocks(framed, [document.id for document in documents], block_size)


def framed_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[np.ndarray]:
    """The ids of each document alone, ``<s> … </s>``, int32."""
    encoded = encode(tokenizer, [document.text for document in documents])
    return [np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], np.int32) for ids in encoded]


def cut_blocks(
    framed: Sequence[np.ndarray], topics: Sequence[str], block_size: int
) -> tuple[list[np.ndarray], list[str]]:
    """The blocks of :func:`document_blocks` and their topics, from :func:`framed_documents` and a topic of each."""
    blocks: list[np.ndarray] = []
    of_blocks: list[str] = []
    for ids, topic in zip(framed, topics, strict=True):
        cuts = range(0, max(len(ids) - block_size, 0) + 1, block_size)
        blocks.extend(ids[start : start + block_size] for start in cuts)
        of_blocks.extend([topic] * len(cuts))
    return blocks, of_blocks


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


@dataclass(frozen=True)
class _Prepared:
    """All sequences with one set of features extracted: rows [n, ...], and of each row what it is."""

    features: Features
    table: Any
    extract_seconds: float  # per sequence
    label: np.ndarray
    identity: pd.DataFrame  # topic, language, sequence


def _prepare(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], features: Features
) -> _Prepared:
    if len(blocks) < 2:
        raise MomeError("A bake-off needs the text of two or more languages.")
    uneven = [language for language in blocks if len(blocks[language]) != len(topics[language])]
    if uneven:
        raise MomeError(f"The language '{uneven[0]}' has not one topic per sequence: use document_blocks.")
    sequences = [sequence for part in blocks.values() for sequence in part]
    start = process_time()
    table = features.extract(sequences)
    seconds = (process_time() - start) / max(1, len(sequences))
    label = np.repeat(np.arange(len(blocks)), [len(part) for part in blocks.values()])
    identity = pd.DataFrame({
        "topic": [topic for language in blocks for topic in topics[language]],
        "language": np.array(list(blocks), dtype=object)[label],
        "sequence": [number for part in blocks.values() for number in range(len(part))],
    })
    return _Prepared(features, table, seconds, label, identity)


def cross_validate(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], vocab_size: int, *,
    estimators: Mapping[str, Any], features: Features | None = None, folds: int = 5, seed: int = 0,
) -> pd.DataFrame:
    """Fit and test each classifier on every fold; what of the features is fitted sees training folds only.

    Args:
        blocks: token sequences of each language. topics: the topic of each, in the same order.
        vocab_size: number of token ids.
        estimators: unfitted classifiers by name, see :func:`classifiers`.
        features: a set of :func:`~mome_utils.bakeoff_models.feature_sets`; single token ids when absent.
        folds: number of folds. seed: of the folds (give estimators the same).

    Returns:
        Rows (seed, features, classifier, fold, topic, language, sequence, predicted, fit_seconds,
        predict_seconds, size_bytes, settings), one per classifier and sequence; ``sequence`` counts within
        the language. ``fit_seconds`` leads from the training folds' token ids to the fitted model,
        ``predict_seconds`` from the ids of *one* sequence to its decision (a fold is decided as one batch).
        Both are processor time on one thread. Extraction runs once for all folds and counts by sequences; the
        weighting that classifiers share counts for each. ``size_bytes`` is what prediction reads, weighting
        included (:func:`~mome_utils.bakeoff_models.fitted_bytes`).

    Raises:
        MomeError: too few languages or topics, or topics that do not match the blocks.
    """
    with threadpool_limits(1):
        prepared = _prepare(blocks, topics, features or token_features(vocab_size))
        return _cross_validate(prepared, estimators, folds, seed)


def _cross_validate(data: _Prepared, estimators: Mapping[str, Any], folds: int, seed: int) -> pd.DataFrame:
    fold_of = assign_folds(data.identity["topic"], folds, seed)
    fold = data.identity["topic"].map(fold_of).to_numpy()
    names = data.identity["language"].to_numpy()[np.unique(data.label, return_index=True)[1]]
    rows = []
    for held_out in range(folds):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        if len(np.unique(data.label[train])) < len(names):
            raise MomeError(
                "A language has all its topics in one fold: give it more documents or use fewer folds."
            )
        weighting = None if data.features.weighting is None else clone(data.features.weighting)
        start = process_time()
        seen = data.table[train] if weighting is None else weighting.fit_transform(data.table[train])
        weighted = process_time()
        unseen = data.table[test] if weighting is None else weighting.transform(data.table[test])
        before_fit = data.extract_seconds * len(train) + weighted - start
        before_predict = data.extract_seconds * len(test) + process_time() - weighted
        for name, estimator in estimators.items():
            model = clone(estimator)
            start = process_time()
            model.fit(seen, data.label[train])
            fitted = process_time()
            predicted = model.predict(unseen)
            end = process_time()
            rows.append(data.identity.iloc[test].assign(
                seed=seed, features=data.features.name, classifier=name, fold=held_out,
                predicted=names[predicted], fit_seconds=before_fit + fitted - start,
                predict_seconds=(before_predict + end - fitted) / len(test),
                size_bytes=fitted_bytes(weighting) + fitted_bytes(model), settings=settings_of(estimator),
            ))
    return pd.concat(rows, ignore_index=True)


Spread = Callable[[Callable[..., pd.DataFrame], Sequence[tuple]], Sequence[pd.DataFrame]]
"""Runs ``function(*job)`` of several jobs and gives the results in order, wherever it runs them."""


def in_turn(function: Callable[..., pd.DataFrame], jobs: Sequence[tuple]) -> list[pd.DataFrame]:
    """The simplest :data:`Spread`: one job after the other, in this process."""
    return [function(*job) for job in jobs]


def bake_off(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], vocab_size: int, *,
    tokenizer: PreTrainedTokenizerFast, seeds: Sequence[int], folds: int = 5,
    costly_with: Sequence[str] = (TOKENS,), spread: Spread = in_turn,
) -> pd.DataFrame:
    """:func:`cross_validate` of all features and classifiers, once per seed, each time with other folds.

    Linear classifiers and naive Bayes meet every set of counted features, the costly classifiers those named
    in ``costly_with``, and the transformer reads the ids in order. Every entry is tested on every sequence with
    every seed.

    Args:
        blocks, topics, vocab_size, folds: as in :func:`cross_validate`.
        tokenizer: turns ids into characters, for the features that read those.
        seeds: of the folds and the classifiers.
        costly_with: names of features.
        spread: how the jobs, one per set of features and seed, are run: in turn, or side by side, for example
            ``functools.partial(mome_utils.sweeps.in_parallel, workers=2)``.
    """
    parts = spread(_cross_validate_features, [
        (blocks, topics, vocab_size, tokenizer, features.name, seed, folds, costly_with)
        for features in feature_sets(tokenizer, vocab_size) for seed in seeds
    ])
    return pd.concat(parts, ignore_index=True)


def _cross_validate_features(
    blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], vocab_size: int,
    tokenizer: PreTrainedTokenizerFast, name: str, seed: int, folds: int, costly_with: Sequence[str],
) -> pd.DataFrame:
    """The rows of :func:`bake_off` of one set of features, by its name, and one seed."""
    features = next(found for found in feature_sets(tokenizer, vocab_size) if found.name == name)
    if name == SEQUENCE:
        estimators = reading_classifiers(seed, vocab_size)
    else:
        estimators = (classifiers if name in costly_with else cheap_classifiers)(seed)
    return cross_validate(
        blocks, topics, vocab_size, estimators=estimators, features=features, folds=folds, seed=seed
    )


def expert_rows(
    experts: Mapping[str, Any], blocks: Mapping[str, Sequence[Any]], topics: Mapping[str, Sequence[str]], *,
    length: int, seed: int = 0,
) -> pd.DataFrame:
    """The experts as classifiers of prefixes: the one with the lowest loss wins.

    Experts are trained on the training split, once for all folds, so they must be given *test* documents
    only: their rows cover fewer topics than the bake-off's and are no cross-validation.

    Args:
        experts: a causal language model of each language. blocks, topics: as in :func:`cross_validate`.
        length: ids that the experts read of each sequence, two or more (all, where it has fewer).
        seed: of the experts.

    Returns:
        Rows as :func:`cross_validate`'s, with ``fold`` 0, features "token_sequence", classifier "experts",
        and a column ``length``. ``fit_seconds`` is missing: they exist already. Their size is that of all of
        them together.
    """
    if length < 2:
        raise MomeError(f"A prefix of {length} ids has no target that an expert could score: use two or more.")
    if set(experts) != set(blocks):
        raise MomeError("Experts can only decide between their own languages: give one for each language.")
    identity = _prepare(blocks, topics, Features(SEQUENCE, len)).identity
    prefixes = [sequence[:length] for part in blocks.values() for sequence in part]
    with threadpool_limits(1):
        start = process_time()
        chosen = expert_losses(experts, prefixes).argmin(1)
        seconds = (process_time() - start) / len(prefixes)
    size = sum(parameter.nbytes for model in experts.values() for parameter in model.parameters())
    return identity.assign(
        seed=seed, features=SEQUENCE, classifier="experts", fold=0,
        predicted=np.array(list(experts), dtype=object)[chosen], fit_seconds=np.nan, predict_seconds=seconds,
        size_bytes=size, settings="lowest loss of the prefix; trained on the training split, scored on test",
        length=length,
    )
