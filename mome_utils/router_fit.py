"""How the router is fitted: TF-IDF over token ids and a linear classifier, compiled into a TokenRouter.

:class:`TokenTfidf` computes the published features (MoME, arXiv 2407.19610: TF-IDF of token ids written as words)
straight from the ids, and :func:`fit_router` fits them with a linear classifier.

Shapes: ``n`` sequences, ``V`` token ids, ``L`` languages, ``F`` features (the ids that the vectorizer keeps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from mome_utils.config import MomeError
from mome_utils.routing import TokenRouter

__all__ = [
    "AS_MEANT_PATTERN", "INDEPENDENT", "PUBLISHED_PATTERN", "Crops", "TokenTfidf", "count_tokens",
    "fit_router", "from_sklearn", "labelled", "random_crops", "token_statistics", "top_features", "words",
]

#: Every id is a word.
AS_MEANT_PATTERN = r"\S+"
#: scikit-learn's default, which the release uses: a word has two characters or more, so ids 0 to 9 are lost.
PUBLISHED_PATTERN = r"(?u)\b\w\w+\b"

#: Concentration from which on a Dirichlet-multinomial sequence is as good as independent draws.
INDEPENDENT = 1e6


@dataclass(frozen=True)
class Crops:
    """Pieces of the training text to train on besides the blocks, so that short prompts count.

    A router trained on full blocks alone has never seen a feature vector of length 1 with few entries.

    Attributes:
        number: crops of each sequence.
        shortest: their least length in tokens; lengths are log-uniform from there to ``longest``.
        longest: ``None`` for the whole sequence.
        from_start: crops begin where the sequence begins, as a prompt does, and not anywhere in it.

    Raises:
        MomeError: a number below 0, a length below 1, or a longest below the shortest.
    """

    number: int = 4
    shortest: int = 1
    longest: int | None = None
    from_start: bool = False

    def __post_init__(self) -> None:
        if self.number < 0 or self.shortest < 1 or (self.longest or self.shortest) < self.shortest:
            raise MomeError(
                f"Crops need a number of 0 or more and lengths of 1 or more, the shortest first, not {self}."
            )


def words(sequences: Sequence[Any]) -> list[str]:
    """Each sequence of token ids as a text of numbers, the form in which the release hands them to TF-IDF.

    Example:
        >>> words([[7, 12], []])
        ['7 12', '']
    """
    return [" ".join(str(int(token)) for token in sequence) for sequence in sequences]


def count_tokens(sequences: Sequence[Any], vocab_size: int) -> sp.csr_matrix:
    """How often each id occurs in each sequence.

    Args:
        sequences: ``n`` sequences of ids (a list of lists or arrays of any lengths, or one array [n, T]).
        vocab_size: ``V``.

    Returns:
        Sparse counts [n, V], float64.

    Raises:
        MomeError: an id is negative or not below ``vocab_size``.
    """
    rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    ids = np.concatenate([np.empty(0, np.int64), *rows])
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise MomeError(
            f"A token id lies outside the router's vocabulary of {vocab_size} ids: "
            "use the tokenizer that the router was fitted with."
        )
    starts = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    counts = sp.csr_matrix((np.ones(ids.size), ids, starts), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts


class TokenTfidf(TransformerMixin, BaseEstimator):
    """TF-IDF of token counts, equal to scikit-learn's ``TfidfVectorizer`` on the ids written as words.

    Term counts times ``idf(t) = ln((1 + n) / (1 + df(t))) + 1``, scaled to Euclidean length 1; ids never seen
    while fitting are ignored, as the vectorizer ignores unknown words.

    Args:
        published_tokens: leave out the ids 0 to 9, as the release's token pattern does without saying so.

    Attributes:
        vocab_size_: ``V``. tokens_: ids of the features, ascending [F]. idf_: their weights [F].
    """

    def __init__(self, *, published_tokens: bool = False) -> None:
        self.published_tokens = published_tokens

    def fit(self, counts: sp.csr_matrix, y: Any = None) -> Self:
        """Learn the document frequencies from counts [n, V]."""
        seen = np.flatnonzero(counts.getnnz(axis=0))
        self.tokens_ = seen[seen >= 10] if self.published_tokens else seen
        self.vocab_size_ = counts.shape[1]
        self.idf_ = TfidfTransformer().fit(counts[:, self.tokens_]).idf_
        return self

    def transform(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Counts [n, V] to features [n, F]; a sequence with no known id gives a row of zeros."""
        return normalize(counts[:, self.tokens_].multiply(self.idf_).tocsr(), norm="l2", copy=False)


def labelled(blocks: Mapping[str, Sequence[Any]], vocab_size: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Token counts of all languages' sequences, in the mapping's order, and the index of each one's language.

    Returns:
        Counts [n, V] and labels [n] (int64).
    """
    counts = sp.vstack([count_tokens(sequences, vocab_size) for sequences in blocks.values()]).tocsr()
    return counts, np.repeat(np.arange(len(blocks)), [len(sequences) for sequences in blocks.values()])


def from_sklearn(
    vectorizer: TokenTfidf | TfidfVectorizer, model: Any, languages: Sequence[str], *, vocab_size: int | None = None
) -> TokenRouter:
    """Compile a fitted scikit-learn pipeline.

    Args:
        vectorizer: a fitted :class:`TokenTfidf`, or a fitted ``TfidfVectorizer`` over :func:`words`.
        model: a fitted linear classifier with ``coef_`` and ``intercept_``.
        languages: the name of each of ``model.classes_``, in that order.
        vocab_size: needed for a ``TfidfVectorizer``, which does not know it.

    For two languages scikit-learn keeps one row with decision value ``d``; the router's rows are then
    ``-d/2`` and ``d/2``: their difference is ``d``, their argmax the model's decision, their softmax the
    probabilities of logistic regression.

    Raises:
        MomeError: not a linear model, other features than the published ones, or names that do not fit.
    """
    if isinstance(vectorizer, TfidfVectorizer):
        plain = vectorizer.norm == "l2" and vectorizer.use_idf and not vectorizer.sublinear_tf
        if not plain or vectorizer.binary or vectorizer.ngram_range != (1, 1) or vocab_size is None:
            raise MomeError(
                "A TfidfVectorizer becomes a router only as plain TF-IDF of single ids with L2 norm: "
                "leave its options at their defaults and give vocab_size."
            )
        tokens = np.array([int(word) for word in vectorizer.get_feature_names_out()], dtype=np.int64)
    else:
        tokens, vocab_size = vectorizer.tokens_, int(vectorizer.vocab_size_)
    if not hasattr(model, "coef_"):
        raise MomeError(
            f"A router is compiled from a linear classifier, which {type(model).__name__} is not: "
            "choose logistic regression, SGD or a linear SVM."
        )
    if len(languages) != len(model.classes_):
        raise MomeError(
            f"The classifier knows {len(model.classes_)} classes, but {len(languages)} names were given: "
            "name each of model.classes_ in its order."
        )
    rows = np.asarray(model.coef_, float)
    bias = np.broadcast_to(model.intercept_, len(rows)).astype(float)
    if len(rows) == 1:
        rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
    router = TokenRouter(vocab_size, languages)
    router.idf[tokens] = torch.from_numpy(np.asarray(vectorizer.idf_, float))
    router.weight[:, tokens] = torch.from_numpy(rows)
    router.bias.copy_(torch.from_numpy(bias))
    return router


def random_crops(sequences: Sequence[Any], crops: Crops | Sequence[Crops] | None, seed: int) -> list[np.ndarray]:
    """Random contiguous pieces of each sequence.

    Args:
        sequences: ``n`` sequences of ids.
        crops: how many of each, how long, and where; several kinds one after the other, or none.
        seed: of lengths and places.

    Returns:
        ``n · crops.number`` arrays of each kind, those of a sequence in a row; a sequence shorter than
        ``crops.shortest`` gives itself.
    """
    generator = np.random.default_rng(seed)
    kinds = [crops] if isinstance(crops, Crops) else list(crops or ())
    pieces = []
    for kind, sequence in product(kinds, [np.asarray(sequence) for sequence in sequences]):
        high = len(sequence) if kind.longest is None else min(kind.longest, len(sequence))
        low = min(kind.shortest, high)
        chance, place = generator.random((2, kind.number))
        # The whole part of a log-uniform number in [low, high + 1) has a chance of about 1/n for each length n.
        lengths = (low * ((high + 1) / max(low, 1)) ** chance).astype(np.int64)
        starts = np.zeros_like(lengths) if kind.from_start else (place * (len(sequence) - lengths + 1)).astype(np.int64)
        pieces += [sequence[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return pieces


def fit_router(
    blocks: Mapping[str, Sequence[Any]],
    vocab_size: int,
    *,
    model: Any = None,
    crops: Crops | Sequence[Crops] | None = None,
    texts: Mapping[str, Sequence[Any]] | None = None,
    block_weight: float = 1.0,
    emphasis: Mapping[str, float] | None = None,
    seed: int = 0,
    published_tokens: bool = False,
) -> TokenRouter:
    """Fit TF-IDF and a linear classifier and compile them.

    Args:
        blocks: token sequences of each language; the mapping's order becomes the order of the logits. The idf
            weights are those of the blocks, whatever else is trained on.
        vocab_size: ``V``.
        model: an unfitted linear scikit-learn classifier; logistic regression with its defaults when absent.
        crops: pieces to train on as well, of one kind or several; none trains on the blocks as they are, as published.
        texts: what the crops are taken from; the blocks when absent.
        block_weight: what a block counts for; a crop counts for 1.
        emphasis: what a language's blocks and crops count for, times the above; 1 for those not named. It is a prior:
            text that could be of either of two languages (an English docstring) goes to the one with more.
        seed: of the crops.
        published_tokens: as in :class:`TokenTfidf`.

    Returns:
        The router, with its languages' :func:`token_statistics` (of the blocks, not of the crops), from which
        :func:`mome_utils.router_growth.add_language` adds another.

    Raises:
        MomeError: fewer than two languages, a language without a sequence, or an emphasis that is not positive or
            names another language.
    """
    empty = [language for language, sequences in blocks.items() if not len(sequences)]
    if len(blocks) < 2 or empty:
        raise MomeError(
            f"A router cannot be fitted without text for {', '.join(empty)}: give it longer documents."
            if empty else "A router needs the text of two or more languages."
        )
    weights = dict.fromkeys(blocks, 1.0) | dict(emphasis or {})
    if set(weights) != set(blocks) or min(weights.values()) <= 0 or block_weight <= 0:
        raise MomeError(f"Weights must be positive, and of {', '.join(blocks)} only, not {weights} for {block_weight}.")
    source = blocks if texts is None else texts
    counts, labels = labelled(blocks, vocab_size)
    vectorizer = TokenTfidf(published_tokens=published_tokens).fit(counts)
    each = np.full(len(labels), float(block_weight))
    if crops is not None:
        extra, owners = labelled({name: random_crops(source[name], crops, seed) for name in blocks}, vocab_size)
        counts, labels = sp.vstack([counts, extra]).tocsr(), np.concatenate([labels, owners])
        each = np.concatenate([each, np.ones(len(owners))])
    each *= np.array([weights[language] for language in blocks])[labels]
    classifier = LogisticRegression(max_iter=1000) if model is None else model
    classifier.fit(vectorizer.transform(counts), labels, **({} if (each == 1).all() else {"sample_weight": each}))
    router = from_sklearn(vectorizer, classifier, tuple(blocks))
    for row, sequences in enumerate(blocks.values()):
        totals, concentration = token_statistics(count_tokens(sequences, vocab_size))
        router.statistics[row] = torch.from_numpy(totals)
        router.concentration[row] = concentration
    return router


def token_statistics(counts: sp.csr_matrix) -> tuple[np.ndarray, float]:
    """What is kept of a language's text: how often each id occurs, and how alike its sequences are.

    A sequence is taken as a draw from a Dirichlet-multinomial distribution: a text repeats its own words. With
    the mean p over ids, s = Σ p² and the concentration α, two tokens of one sequence are equal with probability
    (α s + 1) / (α + 1); α is solved for from the share seen in the sequences.

    Args:
        counts: [n, V], one row per sequence.

    Returns:
        Totals [V] and the concentration: 1e6 where tokens are as good as independent, 0 where it cannot be known.
    """
    totals = np.asarray(counts.sum(axis=0), float).ravel()
    lengths, number = np.asarray(counts.sum(axis=1), float).ravel(), totals.sum()
    pairs = float((lengths * (lengths - 1)).sum())
    if pairs == 0 or number < 2:
        return totals, 0.0
    within = float((counts.data * (counts.data - 1)).sum()) / pairs
    overall = float((totals * (totals - 1)).sum()) / (number * (number - 1))
    if within - overall <= (1 - within) / INDEPENDENT:
        return totals, INDEPENDENT
    return totals, (1 - within) / (within - overall)


def top_features(router: TokenRouter, tokenizer: Any, n: int = 10) -> pd.DataFrame:
    """The ids that speak most strongly for each language, decoded.

    Args:
        router: a fitted router.
        tokenizer: the transformers tokenizer whose ids it reads.
        n: ids per language.

    Returns:
        Rows (language, rank, token, text, weight), by falling weight; bytes that are no text alone are shown
        in the tokenizer's own spelling.
    """
    rows = []
    for language, weights in zip(router.languages, router.weight, strict=True):
        known = torch.where(router.idf > 0, weights, -torch.inf)
        best = known.topk(min(n, int((router.idf > 0).sum())))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for rank, (token, weight) in enumerate(pairs, start=1):
            text = tokenizer.decode([token])
            if "\ufffd" in text:
                text = tokenizer.convert_ids_to_tokens(token)
            rows.append({"language": language, "rank": rank, "token": token, "text": text, "weight": weight})
    return pd.DataFrame(rows)
