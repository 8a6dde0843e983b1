"""Splitting by topic, and balancing languages in tokens.

The MoME paper asks that no language has more than p percent more tokens than the smallest. With articles that
exist in every language the choice of articles cannot do that (all languages of an article enter together), so
long documents are cut at the end of a paragraph or of a top-level statement. Without alignment, documents are
chosen.

Both ways come down to one choice per document, how many of its tokens to keep, and go in two steps: a greedy
pass with a simple rule (longest document first; seeded order), which settles every corpus of some size, and,
where single units are coarse against the bound, an exact search over all sums that can be reached.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from mome_utils.config import MomeError
from mome_utils.corpus import Document, units

SPLITS = ("train", "validation", "test")
#: Memory of the exact search, in bits: documents varied times tokens they hold.
SEARCH_BITS = 25 * 10**7
CountTokens = Callable[[Sequence[str]], list[int]]
#: Texts and, for each, lengths in characters -> tokens of each prefix.
CountPrefixes = Callable[[Sequence[str], Sequence[Sequence[int]]], list[list[int]]]

_TRAILING_BLANK = re.compile(r"\n\s*\Z")


class SplitError(MomeError):
    """Topics that cannot be split as asked."""


class BalanceError(MomeError):
    """Languages that cannot be brought within the bound."""


def seeded_order(keys: Iterable[str], seed: int, salt: str = "") -> list[str]:
    """Keys in a pseudo-random order that depends on each key alone, so that adding one moves no other."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}|{salt}|{key}".encode()).digest())


def split_topics(
    ids: Iterable[str],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    strata: Mapping[str, Hashable] | None = None,
) -> dict[str, str]:
    """Give every topic to "train", "validation" or "test".

    Parameters
    ----------
    ids : topic ids; repeats count once, so the documents of a topic always share its split.
    val_fraction, test_fraction : shares of the topics, in (0, 1), together below 1; at least one topic each.
    seed : decides the order; the order in which `ids` come does not matter.
    strata : topic -> stratum; each stratum is split by itself (the study uses the set of languages a topic
        has, so that no language is left without test documents). Strata of fewer than 3 topics go to train.

    Raises
    ------
    SplitError : fractions out of range, or fewer than 3 topics.
    """
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise SplitError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be above 0 and leave a rest."
        )
    unique = set(ids)
    if len(unique) < 3:
        raise SplitError(f"Three splits need at least 3 topics and there are {len(unique)}; add documents.")
    members: dict[Hashable, list[str]] = {}
    for key in seeded_order(unique, seed, "split"):
        members.setdefault(strata[key] if strata is not None else None, []).append(key)
    result: dict[str, str] = {}
    for keys in members.values():
        n_test = max(1, round(len(keys) * test_fraction)) if len(keys) >= 3 else 0
        n_val = max(1, round(len(keys) * val_fraction)) if len(keys) >= 3 else 0
        n_test = min(n_test, len(keys) - 2) if n_test else 0
        n_val = min(n_val, len(keys) - 1 - n_test) if n_val else 0
        for position, key in enumerate(keys):
            result[key] = (
                "test" if position < n_test else "validation" if position < n_test + n_val else "train"
            )
    return {key: result[key] for key in sorted(result)}


def language_sets(documents: Iterable[Document]) -> dict[str, tuple[str, ...]]:
    """Topic id -> the languages it exists in, sorted."""
    found: dict[str, set[str]] = {}
    for d in documents:
        found.setdefault(d.id, set()).add(d.language)
    return {key: tuple(sorted(codes)) for key, codes in found.items()}


def common_only(documents: Sequence[Document]) -> list[Document]:
    """The documents whose topic exists in every language; `BalanceError` when there are none."""
    sets = language_sets(documents)
    every = tuple(sorted({d.language for d in documents}))
    kept = [d for d in documents if sets[d.id] == every]
    if not kept:
        raise BalanceError(
            f"No document id exists in all of {', '.join(every)}; "
            "align the ids or set common_documents to false."
        )
    return kept


def difference_percent(totals: Mapping[str, int]) -> float:
    """By how many percent the largest language exceeds the smallest, in tokens (inf if one has none)."""
    low, high = min(totals.values()), max(totals.values())
    return math.inf if low == 0 else 100 * (high - low) / low


def balance(
    documents: Sequence[Document],
    count_tokens: CountTokens,
    max_diff_percent: float,
    *,
    common: bool,
    seed: int,
    count_prefixes: CountPrefixes | None = None,
) -> list[Document]:
    """Bring every language within p = `max_diff_percent` of the smallest: max <= (1 + p/100) * min, in
    tokens.

    Parameters
    ----------
    documents : of one split, two languages or more.
    count_tokens : texts -> tokens of each, counted as they will be packed (with `<s>` and `</s>`).
    max_diff_percent : the bound p, 0 or more.
    common : True keeps the topics that exist in every language, the same for all, and cuts the longest
        documents of the larger languages at the end of a unit (`corpus.units`) until the bound holds. False
        leaves texts whole and chooses documents of the larger languages in a seeded order, each taken if it
        still fits.
    seed : for the order in which documents are chosen.
    count_prefixes : the same as `count_tokens` of the prefixes, where there is a faster way.

    Returns
    -------
    The kept documents in their order; a cut one is a prefix of what it was. Every language keeps at least
    one.

    Raises
    ------
    BalanceError : no common topic, or the bound cannot be met; says what could be.
    """
    if not math.isfinite(max_diff_percent) or max_diff_percent < 0:
        raise BalanceError(f"max_diff_percent is {max_diff_percent} but must be 0 or more.")
    if len({d.language for d in documents}) < 2:
        raise BalanceError("Balancing needs documents of at least 2 languages in every split; add documents.")
    if common:
        documents = common_only(documents)
    languages = _languages(documents, count_tokens, count_prefixes if common else None, common=common)
    floor = min(language.total for language in languages.values())
    cap = _cap(floor, max_diff_percent)
    for language in languages.values():
        if language.total > cap and common:
            _cut_longest(language, floor, cap)
        elif language.total > cap:
            _choose_in_order(language, cap, seed)
    reached = difference_percent({code: language.total for code, language in languages.items()})
    if not _within(languages, max_diff_percent):
        reached = min(reached, _search(languages, max_diff_percent))
    if not _within(languages, max_diff_percent):
        advice = "add documents with more paragraphs" if common else "add more, shorter documents"
        raise BalanceError(
            f"The languages cannot be brought within max_diff_percent={max_diff_percent:g}: "
            f"the best possible is {reached:.2f} percent, so raise the bound or {advice}."
        )
    kept = {(d.language, d.id): d for language in languages.values() for d in language.result()}
    return [kept[d.language, d.id] for d in documents if (d.language, d.id) in kept]


def _cap(smallest: int, bound: float) -> float:
    return (1 + bound / 100) * smallest


def _within(languages: Mapping[str, _Language], bound: float) -> bool:
    totals = [language.total for language in languages.values()]
    return min(totals) > 0 and max(totals) <= _cap(min(totals), bound)


@dataclass
class _Language:
    """One language while it is balanced: `sizes[i]` are the tokens document i can have, the last one is all
    of it.
    """

    documents: list[Document]
    sizes: list[list[int]]
    pieces: list[list[str]] | None  # units of each document where cutting is allowed
    kept: list[int]  # index into sizes[i]

    @property
    def total(self) -> int:
        return sum(sizes[k] for sizes, k in zip(self.sizes, self.kept, strict=True))

    def result(self) -> list[Document]:
        """What is kept: prefixes where documents are cut, whole documents or none where they are chosen."""
        rows = zip(self.documents, self.kept, strict=True)
        if self.pieces is None:
            return [d for d, k in rows if k]
        return [
            d if k + 1 == len(p) else replace(d, text=_prefix(p, k + 1))
            for (d, k), p in zip(rows, self.pieces, strict=True)
        ]


def _languages(
    documents: Sequence[Document], count_tokens: CountTokens, count_prefixes: CountPrefixes | None, *, common: bool
) -> dict[str, _Language]:
    """The choices of each language, all documents whole."""
    result = {}
    for code in dict.fromkeys(d.language for d in documents):
        mine = [d for d in documents if d.language == code]
        if not common:
            whole = count_tokens([d.text for d in mine])
            result[code] = _Language(mine, [[0, n] for n in whole], None, [1] * len(mine))
            continue
        pieces = [units(d.text, code) for d in mine]
        ends = [_prefix_lengths(p) for p in pieces]
        if count_prefixes is not None:
            sizes = count_prefixes([d.text for d in mine], ends)
        else:
            counted = iter(count_tokens([d.text[:end] for d, own in zip(mine, ends, strict=True) for end in own]))
            sizes = [[next(counted) for _ in own] for own in ends]
        result[code] = _Language(mine, sizes, pieces, [len(p) - 1 for p in pieces])
    return result


def _prefix(pieces: Sequence[str], count: int) -> str:
    """The first units; the empty lines that would have led to the next one go with it."""
    text = "".join(pieces[:count])
    return text if count == len(pieces) else _TRAILING_BLANK.sub("\n", text)


def prefix_lengths(text: str, language: str) -> list[int]:
    """Lengths in characters of the prefixes of a text that end with a unit; a cut document has one of
    them.
    """
    return _prefix_lengths(units(text, language))


def _prefix_lengths(pieces: Sequence[str]) -> list[int]:
    """Characters of `_prefix(pieces, k)` for k = 1 …"""
    text, found = "".join(pieces), []
    for end in list(accumulate(map(len, pieces)))[:-1]:
        written = len(text[:end].rstrip())
        line = text.find("\n", written, end)
        found.append(end if line < 0 else line + 1)
    return [*found, len(text)]


def _cut_longest(language: _Language, floor: int, cap: float) -> None:
    """Drop last units, each time from the longest document, until the cap; never go below the floor."""
    total = language.total
    heap = [
        (-sizes[k], i) for i, (sizes, k) in enumerate(zip(language.sizes, language.kept, strict=True)) if k
    ]
    heapq.heapify(heap)
    while total > cap and heap:
        i = heapq.heappop(heap)[1]
        sizes, k = language.sizes[i], language.kept[i]
        if total - sizes[k] + sizes[k - 1] < floor:
            continue
        total += sizes[k - 1] - sizes[k]
        language.kept[i] = k - 1
        if k > 1:
            heapq.heappush(heap, (-sizes[k - 1], i))


def _choose_in_order(language: _Language, cap: float, seed: int) -> None:
    """Take documents in a seeded order, each that still fits under the cap."""
    places = {d.id: i for i, d in enumerate(language.documents)}
    total = 0
    for key in seeded_order(places, seed, f"balance {language.documents[0].language}"):
        i = places[key]
        language.kept[i] = int(total + language.sizes[i][1] <= cap)
        total += language.sizes[i][language.kept[i]]


def _search(languages: Mapping[str, _Language], bound: float) -> float:
    """Apply the choice with the most tokens that meets the bound; return the best difference possible.

    Every total a language can reach is enumerated (the subset-sum recurrence, on the bits of an integer).
    With F as the smallest language's total, each other needs a reachable total in [F, cap(F)]. Of very many
    documents only the longest are varied, the others stay as they are.
    """
    free = {code: _free(language) for code, language in languages.items()}
    reach = {code: _reachable(language, free[code]) for code, language in languages.items()}
    fixed = {code: sum(_tokens(language, set(free[code]))) for code, language in languages.items()}
    sums = {code: fixed[code] + _bits(steps[-1]) for code, steps in reach.items()}
    floors = np.unique(np.concatenate(list(sums.values())))
    floors = floors[floors > 0]
    floors = floors[floors <= min(s[-1] for s in sums.values())]
    if not len(floors):
        return math.inf
    nearest = np.max([s[np.searchsorted(s, floors)] for s in sums.values()], axis=0)
    good = np.flatnonzero(nearest <= (1 + bound / 100) * floors)
    if len(good):
        floor = int(floors[good[-1]])
        for code, language in languages.items():
            fits = sums[code][(sums[code] >= floor) & (sums[code] <= _cap(floor, bound))]
            _backtrack(language, free[code], reach[code], int(fits[-1]) - fixed[code])
    return float(100 * np.min((nearest - floors) / floors))


def _free(language: _Language) -> list[int]:
    """Documents to vary: the longest, as many as fit in the memory that the recurrence may take."""
    order = sorted(range(len(language.sizes)), key=lambda i: (-language.sizes[i][-1], i))
    lengths = accumulate(language.sizes[i][-1] for i in order)
    fits = sum(n * (position + 1) <= SEARCH_BITS for position, n in enumerate(lengths))
    return order[: max(1, fits)]


def _tokens(language: _Language, without: Collection[int]) -> list[int]:
    """Tokens kept of each document that is not varied."""
    rows = enumerate(zip(language.sizes, language.kept, strict=True))
    return [sizes[k] for i, (sizes, k) in rows if i not in without]


def _reachable(language: _Language, free: Sequence[int]) -> list[int]:
    """After each free document, the integer whose bit t says whether they can hold t tokens together."""
    steps = [1]
    for i in free:
        bits = 0
        for size in language.sizes[i]:
            bits |= steps[-1] << size
        steps.append(bits)
    return steps


def _bits(number: int) -> np.ndarray:
    """Positions of the set bits, ascending."""
    data = np.frombuffer(number.to_bytes(number.bit_length() // 8 + 1, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(data, bitorder="little"))


def _backtrack(language: _Language, free: Sequence[int], steps: Sequence[int], total: int) -> None:
    """Make the choices that sum to a reachable total, keeping documents as whole as possible."""
    for i, before in zip(reversed(free), reversed(steps[:-1]), strict=True):
        sizes = language.sizes[i]
        fitting = [k for k, n in enumerate(sizes) if n <= total and before >> (total - n) & 1]
        language.kept[i] = fitting[-1]
        total -= sizes[fitting[-1]]
