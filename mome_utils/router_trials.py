"""How the study trains its router, and how that way of training is examined: any window, cross-validated by topic.

The published router learns from full blocks. :func:`for_short_prompts` adds two kinds of pieces of every document: of
a few tokens anywhere in it, and of its beginning, which is what a prompt looks like. The features stay the published
ones, TF-IDF of single token ids, and the classifier stays a logistic regression; a block counts as much as five
pieces, the penalty is a tenth of scikit-learn's, and languages may be weighted.

Shapes: ``L`` languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from mome_utils.bakeoff import Spread, assign_folds, cut_blocks, framed_documents, in_turn
from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.router_fit import Crops, fit_router
from mome_utils.router_windows import document_windows, window_rows
from mome_utils.routing import TokenRouter

__all__ = ["PUBLISHED", "Training", "examine", "for_short_prompts", "train_router"]


@dataclass(frozen=True)
class Training:
    """A way to train a router; the arguments are those of :func:`mome_utils.router_fit.fit_router`.

    Attributes:
        crops: kinds of pieces of each document to learn from besides its blocks.
        block_weight: what a block counts for; a piece counts for 1.
        emphasis: what a language counts for, 1 where not named (languages that the router lacks are passed over).
        strength: inverse strength of the L2 penalty, scikit-learn's ``C``.
    """

    crops: tuple[Crops, ...] = ()
    block_weight: float = 1.0
    emphasis: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0

    def fit(self, blocks: Mapping[str, Any], texts: Mapping[str, Any], vocab_size: int, seed: int) -> TokenRouter:
        """The router of blocks and whole documents of each language; see :func:`train_router`."""
        return fit_router(
            blocks, vocab_size, model=LogisticRegression(C=self.strength, max_iter=3000), crops=self.crops or None,
            texts=texts, block_weight=self.block_weight, seed=seed,
            emphasis={language: weight for language, weight in self.emphasis.items() if language in blocks},
        )


#: Full blocks and scikit-learn's defaults, as in the release.
PUBLISHED = Training()


def for_short_prompts(pieces: int = 200, emphasis: Mapping[str, float] | None = None) -> Training:
    """The training of the study's router.

    Args:
        pieces: of 4 to 64 tokens from anywhere in each document; three tenths as many of 16 to 256 tokens begin where
            the document begins, behind its ``<s>``.
        emphasis: see :class:`Training`.

    Raises:
        MomeError: no pieces.
    """
    if pieces < 1:
        raise MomeError(f"A router for short prompts learns from one piece of each document or more, not {pieces}.")
    prompts = Crops(max(1, round(0.3 * pieces)), 16, 256, from_start=True)
    return Training((Crops(pieces, 4, 64), prompts), block_weight=5.0, emphasis=dict(emphasis or {}), strength=10.0)


@dataclass(frozen=True)
class _Text:
    """Documents as ids: of each language the blocks, the whole documents ``<s> … </s>``, and the topic of each."""

    blocks: dict[str, list[np.ndarray]]
    block_topics: dict[str, list[str]]
    texts: dict[str, list[np.ndarray]]
    text_topics: dict[str, list[str]]

    def lengths(self) -> dict[tuple[str, str], int]:
        """Tokens of each language's and topic's document, without ``<s>`` and ``</s>``."""
        return {(g, topic): len(ids) - 2 for g, part in self.texts.items()
                for topic, ids in zip(self.text_topics[g], part, strict=True)}

    def of(self, topics: frozenset[str]) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
        """Blocks and documents of some topics."""
        return _select(self.blocks, self.block_topics, topics), _select(self.texts, self.text_topics, topics)


def _select(
    parts: Mapping[str, list[np.ndarray]], topics: Mapping[str, list[str]], chosen: frozenset[str]
) -> dict[str, list[np.ndarray]]:
    return {
        language: [ids for ids, topic in zip(part, topics[language], strict=True) if topic in chosen]
        for language, part in parts.items()
    }


def _read(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], block_size: int) -> _Text:
    """Languages come in the order in which the documents first name them."""
    by_language: dict[str, list[Document]] = {}
    for document in documents:
        by_language.setdefault(document.language, []).append(document)
    blocks, block_topics, texts, text_topics = {}, {}, {}, {}
    for language, own in by_language.items():
        texts[language], text_topics[language] = framed_documents(tokenizer, own), [document.id for document in own]
        blocks[language], block_topics[language] = cut_blocks(texts[language], text_topics[language], block_size)
    return _Text(blocks, block_topics, texts, text_topics)


def train_router(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], block_size: int, training: Training, *,
    seed: int = 0,
) -> TokenRouter:
    """A router of some documents, not calibrated.

    Args:
        tokenizer: whose ids it reads. documents: of two languages or more; the order of the languages is that in which
            they first occur. block_size: in tokens. training: how. seed: of the crops.

    Raises:
        MomeError: fewer than two languages.
    """
    text = _read(tokenizer, documents, block_size)
    return training.fit(text.blocks, text.texts, len(tokenizer), seed)


def examine(
    trials: Mapping[str, tuple[PreTrainedTokenizerFast, Training]], documents: Sequence[Document], block_size: int,
    sizes: Sequence[int], folds: int = 5, seed: int = 0, spread: Spread = in_turn,
) -> pd.DataFrame:
    """Every window of every document, decided by a router that was trained without its topic.

    Args:
        trials: by name, the tokenizer and the training of the routers to examine.
        documents, block_size: as in :func:`train_router`.
        sizes: of the windows, in tokens; each size is also the distance from window to window.
        folds: parts of the cross-validation. seed: of the folds and the crops.
        spread: how the folds of all trials are run, as in :func:`mome_utils.bakeoff.bake_off`.

    Returns:
        Rows of :func:`mome_utils.router_windows.window_rows` with the columns ``trial`` and ``fold``, trial by trial,
        without the probabilities of the single languages (they are not calibrated).

    Raises:
        MomeError: a tokenizer for which no document is as long as the longest windows, before any router is trained.
    """
    fold_of = assign_folds([document.id for document in documents], folds, seed)
    read: dict[int, _Text] = {}
    for tokenizer, _ in trials.values():
        if id(tokenizer) not in read:
            read[id(tokenizer)] = text = _read(tokenizer, documents, block_size)
            if max(sizes) > max(text.lengths().values()):
                raise MomeError(f"No document has {max(sizes)} tokens: use shorter windows or longer documents.")
    jobs = [(name, fold) for name in trials for fold in range(folds)]
    # The trainings with most pieces first: whoever is done early goes on with the short ones.
    jobs.sort(key=lambda job: -sum(kind.number for kind in trials[job[0]][1].crops))
    held_out = [[document for document in documents if fold_of[document.id] == fold] for fold in range(folds)]
    known = [frozenset(topic for topic, place in fold_of.items() if place != fold) for fold in range(folds)]
    found = spread(_examine_fold, [
        (*trials[name], read[id(trials[name][0])], known[fold], held_out[fold], sizes, seed) for name, fold in jobs
    ])
    rows = {job: table.assign(trial=job[0], fold=job[1]) for job, table in zip(jobs, found, strict=True)}
    return pd.concat([rows[name, fold] for name in trials for fold in range(folds)], ignore_index=True)


def _examine_fold(
    tokenizer: PreTrainedTokenizerFast, training: Training, text: _Text, known: frozenset[str],
    held_out: Sequence[Document], sizes: Sequence[int], seed: int,
) -> pd.DataFrame:
    """The rows of :func:`examine` of one fold: learn from the known topics, decide the windows of the others."""
    lengths = text.lengths()
    rows = []
    with threadpool_limits(1):
        router = training.fit(*text.of(known), len(tokenizer), seed)
        for size in sizes:
            if long := [document for document in held_out if lengths[document.language, document.id] >= size]:
                rows.append(window_rows(router, document_windows(tokenizer, long, size), seed=seed))
    found = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    return found[[column for column in found.columns if not column.startswith("p_")]]
