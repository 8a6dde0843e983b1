"""The same topic in several languages: does a model bring its representations together?

The rows are topics that exist in every language, and a topic's representation in a language is the mean over its
passages. Two questions are asked, layer by layer. Are topics arranged alike in both languages (a similarity of two
representations, as between models)? And does a topic in one language lie nearest to itself in another, among all
topics (retrieval)? The first compares shapes and needs no common space; the second needs one.

A *reader* of the languages is a mapping from language to model: one model for all, or a mixture's experts, each for
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mome_utils.config import MomeError
from mome_utils.representations import Aggregation, topic_means
from mome_utils.similarity import NEIGHBOURS, Space, compare_all
from mome_utils.similarity_baselines import ALL, permuted, topic_folds
from mome_utils.similarity_inputs import FEWEST_ROWS, Array, centred, unit_rows
from mome_utils.similarity_study import Collection, Ref

__all__ = ["common_topics", "language_rows", "retrieval_ranks", "retrieval_rows", "topic_clouds"]


def common_topics(models: Collection) -> list[str]:
    """The topics that were read in every language, in alphabetical order; none where too few are parallel."""
    shared = set.intersection(*(set(models.topics(language)) for language in models.passages))
    return sorted(shared) if len(shared) > FEWEST_ROWS and len(models.passages) > 1 else []


def topic_clouds(
    models: Collection, readers: Mapping[str, Ref], aggregation: Aggregation, layer: int
) -> dict[str, Array]:
    """By language, the representations [topics, D] of the common topics by the language's reader.

    Raises:
        MomeError: too few topics are common to the languages.
    """
    wanted = common_topics(models)
    if not wanted:
        raise MomeError("The languages share too few topics: use a corpus whose documents have the same ids.")
    found = {}
    for language, ref in readers.items():
        names, means = topic_means(models.states(ref, language)[aggregation][layer], models.topics(language))
        places = {name: i for i, name in enumerate(names)}
        found[language] = means[[places[name] for name in wanted]]
    return found


def _read(models: Collection, readers: Mapping[str, Mapping[int, Mapping[str, Ref]]]) -> None:
    models.read((ref, language) for by_seed in readers.values() for refs in by_seed.values()
                for language, ref in refs.items())


def _layers(models: Collection, readers: Mapping[str, Ref], aggregation: Aggregation) -> range:
    first, ref = next(iter(readers.items()))
    return range(len(models.states(ref, first)[aggregation]))


def language_rows(
    models: Collection, readers: Mapping[str, Mapping[int, Mapping[str, Ref]]], measures: Sequence[str], *,
    aggregation: Aggregation = "mean", draws: int = 4,
) -> pd.DataFrame:
    """How alike two languages arrange the common topics, at every layer, for every pair of languages.

    Args:
        readers: kind → seed → language → model. measures: names. draws: permutations of the floor.

    Returns:
        ``kind, seed, layer, language, language_b, measure, fold, value``; ``fold`` is a left-out fold of topics, or
        ALL; rows of kind ``permuted <kind>`` hold the floor.
    """
    topics, rows = common_topics(models), []
    _read(models, readers)
    folds = min(models.folds, len(topics))
    of_topic = topic_folds(topics, folds) if folds > 1 else np.zeros(len(topics))
    for kind, by_seed in readers.items():
        for seed, refs in by_seed.items():
            for layer in _layers(models, refs, aggregation):
                clouds = topic_clouds(models, refs, aggregation, layer)
                with threadpool_limits(1):  # small matrices: threads would wait more than they compute
                    for fold in (ALL, *range(folds if folds > 1 else 0)):
                        spaces = {g: Space(cloud[of_topic != fold], neighbours=_neighbours(cloud[of_topic != fold]))
                                  for g, cloud in clouds.items()}
                        for g, h in combinations(clouds, 2):
                            at = (seed, layer, g, h)
                            scores = compare_all(spaces[g], spaces[h], measures)
                            rows += [(kind, *at, name, fold, value) for name, value in scores.items()]
                            if fold == ALL:
                                floor = permuted(spaces[g], spaces[h], measures, draws=draws)
                                rows += [(f"permuted {kind}", *at, name, fold, value) for name, value in floor.items()]
    columns = ["kind", "seed", "layer", "language", "language_b", "measure", "fold", "value"]
    return pd.DataFrame(rows, columns=columns)


def _neighbours(cloud: Array) -> int:
    return min(NEIGHBOURS, max(1, len(cloud) // 4))


def retrieval_ranks(queries: Array, candidates: Array, *, centre: bool = True) -> NDArray[np.int64]:
    """The place of candidate i among all candidates, by cosine to query i: 1 is found at once, [n].

    Args:
        queries, candidates: [n, d], row i of both for topic i.
        centre: take each side's mean off first. What all texts of a language have in common says nothing about their
            topics, and is often most of a vector.

    Equally near candidates come before the right one, so a model that sees no difference finds nothing.

    Raises:
        MomeError: different shapes, or fewer than two topics.
    """
    if queries.shape != candidates.shape or len(queries) < 2:
        raise MomeError(
            f"Retrieval needs queries and candidates of one shape, two topics or more, not {queries.shape} and "
            f"{candidates.shape}."
        )
    a, b = (unit_rows(centred(side) if centre else side) for side in (queries, candidates))
    similarities = a @ b.T
    own = np.diag(similarities)[:, None]
    before = (similarities >= own) & ~np.eye(len(a), dtype=bool)
    return np.asarray(1 + before.sum(1), dtype=np.int64)


def retrieval_rows(
    models: Collection, readers: Mapping[str, Mapping[int, Mapping[str, Ref]]], *, aggregation: Aggregation = "mean",
    centres: Sequence[bool] = (True, False),
) -> pd.DataFrame:
    """Every common topic sought in every other language, at every layer.

    Returns:
        ``kind, seed, layer, language`` (of the query), ``language_b`` (of the candidates), ``centred``, ``document``
        (the topic), ``rank``, ``top1`` (0 or 1) and ``reciprocal`` (1 / rank; its mean is the MRR).
    """
    topics, parts = common_topics(models), []
    _read(models, readers)
    for kind, by_seed in readers.items():
        for seed, refs in by_seed.items():
            for layer in _layers(models, refs, aggregation):
                clouds = topic_clouds(models, refs, aggregation, layer)
                for (g, h), centre in ((pair, centre) for pair in permutations(clouds, 2) for centre in centres):
                    ranks = retrieval_ranks(clouds[g], clouds[h], centre=centre)
                    parts.append(pd.DataFrame({
                        "kind": kind, "seed": seed, "layer": layer, "language": g, "language_b": h, "centred": centre,
                        "document": topics, "rank": ranks, "top1": (ranks == 1).astype(float), "reciprocal": 1 / ranks,
                    }))
    return pd.concat(parts, ignore_index=True)
