"""How the router is examined: windows of a few tokens, where they lie, and how many are routed right.

A window is any run of ``size`` tokens inside a document, so most begin in the middle of a sentence and none holds
``<s>``. Windows of Python have a *region*: the label of a docstring, a string or a comment is Python although its
words are English, so such windows are counted with all others and also reported apart.

How far its confidence can be trusted is seen in :mod:`mome_utils.router_confidence`.

Shapes: ``n`` windows or sequences, ``L`` languages, ``S`` seeds, ``D`` topics. Accuracies are in points, 0 to 100;
probabilities are shares, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import PYTHON_CODES, Document
from mome_utils.corruption import text_spans
from mome_utils.intervals import Interval, combine
from mome_utils.routing import TokenRouter

__all__ = [
    "CODE", "PROSE", "TEXT_IN_CODE", "Windows", "accuracy_interval", "document_windows",
    "prefix_accuracy", "probabilities_of", "window_rows", "window_table",
]

#: The regions of a window.
PROSE, CODE, TEXT_IN_CODE = "prose", "code", "text in code"

DRAWS = 2000
#: Windows per call of the router.
_BATCH = 4096


@dataclass(frozen=True)
class Windows:
    """Windows of one size.

    Attributes:
        ids: token ids [n, size], int32.
        language, topic, region: of each window [n] (str). topic: the document's id. region: see
            :func:`document_windows`.
        start: place of its first token in the document [n], int64.
    """

    ids: np.ndarray
    language: np.ndarray
    topic: np.ndarray
    region: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, chosen: np.ndarray) -> Windows:
        """The windows that a mask or an index array [n] chooses."""
        return Windows(*(values[chosen] for values in vars(self).values()))


# ------------------------------------------------------------------------------------------------ windows


def document_windows(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], size: int, stride: int | None = None
) -> Windows:
    """All windows of ``size`` tokens of the documents' text, without ``<s>`` and ``</s>``.

    Windows begin at token 0, ``stride``, 2 · ``stride`` … of each document; what is left at its end and shorter than
    a window is dropped. A window's region is ``prose`` in a natural language, and in Python ``text in code`` where
    more than half of its tokens lie in a string or a comment (:func:`text_spans`), else ``code``. A token lies there
    if half of its characters or more do; of a character that is split over several tokens each token counts.

    Args:
        tokenizer: the study's tokenizer (a fast one: the places of its tokens are needed).
        documents: of any languages. size, stride: in tokens; ``stride`` is ``size`` when absent.

    Returns:
        The windows, in the order of the documents.

    Raises:
        MomeError: ``size`` or ``stride`` below 1, or no document as long as a window.
    """
    documents, stride = list(documents), size if stride is None else stride
    if size < 1 or stride < 1:
        raise MomeError(f"Windows of {size} tokens every {stride} tokens cannot be cut: use whole numbers above 0.")
    ids, starts, regions, owners = [], [], [], []
    for number, (document, (tokens, offsets)) in enumerate(zip(documents, _tokens(tokenizer, documents), strict=True)):
        first = np.arange(0, len(tokens) - size + 1, stride)
        if not len(first):
            continue
        places = first[:, None] + np.arange(size)
        ids.append(tokens[places])
        starts.append(first)
        owners.append(np.full(len(first), number))
        if document.language.lower() in PYTHON_CODES:
            inside = _tokens_in_text(document.text, offsets)
            regions.append(np.where(2 * inside[places].sum(1) > size, TEXT_IN_CODE, CODE))
        else:
            regions.append(np.full(len(first), PROSE))
    if not ids:
        raise MomeError(f"No document has {size} tokens: use shorter windows or longer documents.")
    language, topic = np.array([[d.language, d.id] for d in documents], dtype=object)[np.concatenate(owners)].T
    region = np.concatenate(regions).astype(object)
    return Windows(np.concatenate(ids), language, topic, region, np.concatenate(starts))


def _tokens(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], *, batch: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids [T] and character ranges [T, 2] of each document; few at a time, since the tokenizer gives them as lists."""
    for start in range(0, len(documents), batch):
        texts = [document.text for document in documents[start : start + batch]]
        coded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
        for ids, offsets in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            yield np.array(ids, dtype=np.int32), np.array(offsets).reshape(-1, 2)


def _tokens_in_text(source: str, offsets: np.ndarray) -> np.ndarray:
    """For tokens with character ranges [T, 2]: does at least half of each lie in a string or a comment? [T] bool."""
    covered = np.zeros(len(source) + 1, dtype=np.int64)
    for span in text_spans(source):
        covered[span.start + 1 : span.end + 1] = 1
    before = covered.cumsum()  # characters of text before each place
    start, end = offsets.T
    return np.asarray(2 * (before[end] - before[start]) >= np.maximum(end - start, 1))


# -------------------------------------------------------------------------------------- what the router says


def window_rows(router: TokenRouter, windows: Windows, *, seed: int = 0) -> pd.DataFrame:
    """What a router says about each window.

    The most probable language is decided for; abstention is left aside here (see
    :func:`mome_utils.router_confidence.risk_coverage`).

    Returns:
        Rows (seed, size, topic, language, region, start, predicted, correct, confidence, p_<language> …), one per
        window; ``confidence`` is the largest probability.

    Raises:
        MomeError: a window's language is none of the router's.
    """
    strange = sorted(set(windows.language) - set(router.languages))
    if strange:
        raise MomeError(f"The router does not know the language '{strange[0]}': leave out its windows.")
    ids = torch.from_numpy(windows.ids.astype(np.int64)).split(_BATCH)
    chance = torch.cat([router.probabilities(part) for part in ids]).cpu().numpy()
    predicted = np.array(router.languages, dtype=object)[chance.argmax(1)]
    return pd.DataFrame({
        "seed": seed, "size": windows.ids.shape[1], "topic": windows.topic, "language": windows.language,
        "region": windows.region, "start": windows.start, "predicted": predicted,
        "correct": predicted == windows.language, "confidence": chance.max(1),
        **{f"p_{name}": chance[:, place] for place, name in enumerate(router.languages)},
    })


def probabilities_of(rows: pd.DataFrame, languages: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, L] and true labels [n] of :func:`window_rows`, as :mod:`mome_utils.router_confidence` wants."""
    place = {name: index for index, name in enumerate(languages)}
    labels = rows["language"].map(place).to_numpy(dtype=np.int64)
    return rows[[f"p_{name}" for name in languages]].to_numpy(dtype=float), labels


# ----------------------------------------------------------------------------------------------- accuracy


def accuracy_interval(rows: pd.DataFrame) -> Interval:
    """Share of correct rows in points, with a 95 % interval over topics (and seeds, where there are several).

    Topics are resampled whole, as in :mod:`mome_utils.bakeoff`: windows of one document resemble each other. Where
    not one row is wrong, the lower limit is the rule of three (Hanley & Lippman-Hand 1983): 3 wrong topics among as
    many, a cautious limit, wider than that of a single error.

    Args:
        rows: with columns seed, topic, correct; at least one.
    """
    if rows.empty:
        raise MomeError("There are no windows to score: choose rows of a size and region that occur.")
    seed, seeds = pd.factorize(rows["seed"], sort=True)
    topic, topics = pd.factorize(rows["topic"], sort=True)
    counts = np.zeros((len(topics), len(seeds), 2))  # correct ones, all
    np.add.at(counts, (topic, seed), np.stack([rows["correct"].to_numpy(dtype=float), np.ones(len(rows))], axis=1))
    drawn = (_draws(len(topics)) @ counts.reshape(len(topics), -1)).reshape(DRAWS, len(seeds), 2)
    drawn, total = drawn[(drawn[..., 1] > 0).all(1)], counts.sum(0)  # a draw can miss a seed's few topics
    found = combine(100 * total[:, 0] / total[:, 1], 100 * drawn[..., 0] / drawn[..., 1], documents=len(topics))
    low = 100 - min(300 / len(topics), 100) if rows["correct"].all() else found.low
    return replace(found, low=max(low, 0.0), high=min(found.high, 100.0))


@lru_cache(maxsize=4)
def _draws(topics: int) -> np.ndarray:
    """How often each topic is drawn when as many as there are are drawn with replacement, [draws, D]."""
    return np.random.default_rng(0).multinomial(topics, np.full(topics, 1 / topics), size=DRAWS).astype(float)


def window_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by size and part, from :func:`window_rows` (of several sizes and seeds, if wanted).

    Returns:
        Rows (size, part, windows, topics, accuracy, low, high) by size, in points. The parts are the languages, the
        regions and ``all``; ``windows`` counts those of one seed.
    """
    table = []
    for size, own in rows.groupby("size"):
        parts = {name: own["language"] == name for name in dict.fromkeys(own["language"])}
        parts |= {region: own["region"] == region for region in (PROSE, CODE, TEXT_IN_CODE)}
        parts["all"] = own["region"].notna()
        for part, mask in parts.items():
            if mask.any():
                found = accuracy_interval(own[mask])
                table.append({
                    "size": size, "part": part, "windows": int(mask.sum()) // found.seeds,
                    "topics": found.documents, "accuracy": found.estimate, "low": found.low, "high": found.high,
                })
    return pd.DataFrame(table)


def prefix_accuracy(
    route: Callable[[torch.Tensor], torch.Tensor], sequences: Mapping[str, Sequence[np.ndarray]],
    topics: Mapping[str, Sequence[str]], lengths: Iterable[int],
) -> pd.DataFrame:
    """Accuracy when only the first tokens of a sequence are shown.

    Args:
        route: ids [B, T] to indices into the mapping's languages [B], for example ``router.route`` (an abstention
            counts as wrong).
        sequences: of each language, in the order of the router's languages. topics: the topic of each.
        lengths: how many tokens to show; sequences that are shorter than that do not take part.

    Returns:
        Rows (language, tokens, sequences, accuracy, low, high) in points; intervals over topics, as in
        :func:`accuracy_interval`.

    Raises:
        MomeError: a length below 1, no sequence that long, or topics that do not match.
    """
    table = []
    for place, (language, own) in enumerate(sequences.items()):
        if len(topics[language]) != len(own):
            raise MomeError(f"The language '{language}' has not one topic per sequence: use document_blocks.")
        sizes = np.array([len(ids) for ids in own], dtype=np.int64)
        for length in lengths:
            chosen = np.flatnonzero(sizes >= length).tolist()
            if length < 1 or not chosen:
                raise MomeError(
                    f"The language '{language}' has no prefix of {length} tokens: "
                    f"use lengths from 1 to {sizes.max(initial=0)}."
                )
            shown = torch.from_numpy(np.stack([own[i][:length] for i in chosen]).astype(np.int64))
            routed = torch.cat([route(part) for part in shown.split(_BATCH)]).cpu().numpy()
            topic = [topics[language][i] for i in chosen]
            found = accuracy_interval(pd.DataFrame({"seed": 0, "topic": topic, "correct": routed == place}))
            table.append({
                "language": language, "tokens": length, "sequences": len(chosen),
                "accuracy": found.estimate, "low": found.low, "high": found.high,
            })
    return pd.DataFrame(table)
