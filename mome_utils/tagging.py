"""Texts whose words carry labels, and their way to a model: subwords with one label per word.

A word may be cut into several subwords. As is usual for token classification (Devlin et al. 2019, arXiv 1810.04805),
the label stands at the word's *first* subword and the others are ignored (−100): every word is scored once, whatever
the tokenizer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.models import IGNORED

__all__ = ["OUTSIDE", "Sentence", "Tagged", "Word", "entity_spans", "sentences", "to_bio"]

#: Label of a word in no span.
OUTSIDE = "O"
#: A word: begin and end in characters of its text, and its label.
Word = tuple[int, int, str]


@dataclass(frozen=True)
class Tagged:
    """A text and its labelled words, in order and apart from each other.

    Attributes:
        document: id of what the text belongs to; what is resampled when intervals are computed.
        language: language code.
        text: the text.
        words: ``(begin, end, label)`` in characters.
        breaks: characters at which the text may be cut into sentences, ascending.
    """

    document: str
    language: str
    text: str
    words: tuple[Word, ...]
    breaks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        reached = 0
        for begin, end, label in self.words:
            if begin < reached or end <= begin or end > len(self.text):
                raise MomeError(
                    f"The word at characters {begin} to {end} of '{self.document}', labelled '{label}', overlaps "
                    "another or lies outside its text: give words in order."
                )
            reached = end


@dataclass(frozen=True)
class Sentence:
    """What a model reads: subword ids and, for each, the index of its label or −100. No special tokens."""

    document: str
    language: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def sentences(
    tokenizer: PreTrainedTokenizerFast, tagged: Sequence[Tagged], labels: Sequence[str], longest: int
) -> list[Sentence]:
    """Cut texts into sentences of at most ``longest`` subwords and align the labels.

    A sentence ends at the last of the text's ``breaks`` that fits. Where none fits, it ends before a word that begins
    no subword too late and continues no span (a label ``I-…``); a word longer than a sentence is left out. Stretches
    without a labelled word are left out.

    Args:
        tokenizer: any fast tokenizer (it must tell offsets).
        tagged: the texts.
        labels: all labels, in the order of their indices.
        longest: subwords of a sentence at most.

    Raises:
        MomeError: a label that ``labels`` lacks, or ``longest`` below 1.
    """
    if longest < 1:
        raise MomeError(f"A sentence needs room for at least one subword, not {longest}.")
    index = {label: i for i, label in enumerate(labels)}
    for item in tagged:
        for _, _, label in item.words:
            if label not in index:
                raise MomeError(f"The label '{label}' of '{item.document}' is none of {', '.join(labels)}.")
    if not tagged:
        return []
    encoded = tokenizer([t.text for t in tagged], add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for item, ids, offsets in zip(tagged, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        marks, soft, hard = _align(item, offsets, index)
        for begin, end in _cuts(len(ids), soft, hard, longest):
            own = tuple(marks[begin:end])
            if any(mark != IGNORED for mark in own):
                found.append(Sentence(item.document, item.language, tuple(ids[begin:end]), own))
    return found


def _align(
    item: Tagged, offsets: Sequence[tuple[int, int]], index: Mapping[str, int]
) -> tuple[list[int], list[int], list[int]]:
    """The label of each subword; the subwords at which a sentence may begin (breaks); and those at which it can."""
    marks = [IGNORED] * len(offsets)
    soft, hard, word, cut = [0], [0], 0, 0
    open_until = 0  # end of the word that the last subword reached into
    for i, (begin, end) in enumerate(offsets):
        piece = item.text[begin:end]
        if piece.strip():
            begin += len(piece) - len(piece.lstrip())
        while word < len(item.words) and item.words[word][1] <= begin:
            word += 1
        # A sentence may begin here: inside no word, and what comes next continues no span.
        if begin >= open_until and not (word < len(item.words) and item.words[word][2].startswith("I-")):
            hard.append(i)
        if word < len(item.words) and item.words[word][0] < end and item.words[word][1] > open_until:
            marks[i] = index[item.words[word][2]]
            open_until = item.words[word][1]
        if cut < len(item.breaks) and item.breaks[cut] <= begin:
            soft.append(i)
            while cut < len(item.breaks) and item.breaks[cut] <= begin:
                cut += 1
    return marks, soft, hard


def _cuts(size: int, soft: Sequence[int], hard: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """Begin and end of each sentence: at the last soft place that fits, else at the last hard one."""
    pieces, begin = [], 0
    allowed = set(hard)
    soft = [place for place in soft if place in allowed]
    while begin < size:
        if size - begin <= longest:
            pieces.append((begin, size))
            break
        end = _last(soft, begin + longest)
        end = end if end > begin else _last(hard, begin + longest)
        if end > begin:
            pieces.append((begin, end))
            begin = end
        else:  # one word is longer than a sentence: go on after it
            after = bisect_right(hard, begin)
            begin = hard[after] if after < len(hard) else size
    return pieces


def _last(places: Sequence[int], limit: int) -> int:
    """The last of ascending places that is not beyond the limit; they begin with 0."""
    return places[bisect_right(places, limit) - 1]


def to_bio(labels: Sequence[str]) -> list[str]:
    """Labels of one sentence in IOB1 (``B-`` only between neighbours of one kind) or BIO, all in BIO (IOB2).

    CoNLL-2003 is distributed in IOB1 (Tjong Kim Sang & De Meulder 2003).

    >>> to_bio(["I-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    ['B-PER', 'I-PER', 'O', 'B-LOC', 'B-LOC']
    """
    found, before = [], OUTSIDE
    for label in labels:
        continues = before != OUTSIDE and before[2:] == label[2:]
        found.append("B-" + label[2:] if label.startswith("I-") and not continues else label)
        before = label
    return found


def entity_spans(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Spans ``(kind, first, last + 1)`` of a sentence in BIO, by the rule of the CoNLL evaluation.

    An ``I-`` that continues nothing of its kind begins a span, as in conlleval and in seqeval's default mode (Nakayama
    2018). The tests hold it to seqeval, which is not used here because F1 is needed by document, for its interval.

    >>> sorted(entity_spans(["B-PER", "I-PER", "I-LOC", "O"]))
    [('LOC', 2, 3), ('PER', 0, 2)]
    """
    found, first, kind = set(), 0, ""
    for i, label in enumerate([*labels, OUTSIDE]):
        prefix, _, own = label.partition("-")
        if kind and (prefix != "I" or own != kind):
            found.add((kind, first, i))
            kind = ""
        if prefix in ("B", "I") and (prefix == "B" or not kind):
            first, kind = i, own
    return found
