"""``mome bench dataset``: a corpus split, balanced in tokens and packed into blocks, against a textbook's way.

*The textbook* balances as one would write it down (cut the longest document, read it again, until the language fits)
and makes the blocks with ``datasets``: a ``map`` that tokenizes and a ``map`` of ``group_texts``, as transformers'
example for causal language modelling does; once with a document at a time, once with batches of documents. *Ours* is
what notebook 01 calls (:func:`~mome_utils.dataset.prepare` and :func:`~mome_utils.dataset.pack_all`), which reads
each text once and also says which documents each block holds. Both start from the same documents, the same tokenizer
and the same split of the topics, and end with the same blocks, which is checked first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from mome_utils.balance import SPLITS, common_only, language_sets, prefix_lengths, seeded_order, split_topics
from mome_utils.bench import alternate
from mome_utils.config import MomeError
from mome_utils.corpus import Corpus, Document, load_corpus
from mome_utils.dataset import DATA_SEED, pack_all, prepare
from mome_utils.tokenization import train_tokenizer

__all__ = ["dataset"]

#: How the textbook's tokenizer is called: for one document at a time, or for batches of them.
WAYS = {"by document": False, "by batch": True}
#: Share of the topics in validation, and in test: what `prepare` takes by default.
HELD_OUT = 0.1

Blocks = Mapping[tuple[str, str], np.ndarray]


def dataset(
    *,
    root: Path,
    rounds: int = 5,
    vocabulary: int = 2048,
    block: int = 128,
    max_diff_percent: float = 5.0,
    topics: int | None = None,
    least_seconds: float = 0.2,
) -> Iterator[dict[str, Any]]:
    """Making the study's data set of the embedded corpus, with a tokenizer trained beforehand.

    What is counted is the time that the process computes, all its threads together.

    Args:
        root: the project's folder, which holds the corpus.
        rounds: how often each has its turn.
        vocabulary: entries of the tokenizer. block: tokens of a block. max_diff_percent: of the balance.
        topics: of the corpus; ``None`` takes all.
        least_seconds: see :func:`~mome_utils.bench.alternate`.

    Returns:
        Rows, each as soon as it is measured: for each way of the textbook its seconds and ours (medians over the
        rounds) and the ratio textbook / ours (median, lowest and highest round).

    Raises:
        MomeError: the blocks differ, or the corpus is too small for its splits.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    corpus = load_corpus("embedded", topics=topics, root=root)
    tokenizer = train_tokenizer([document.text for document in corpus.documents], vocabulary)
    expected = ours(corpus, tokenizer, block, max_diff_percent)
    return _rows(corpus, tokenizer, block, max_diff_percent, rounds, least_seconds, expected)


def _rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, block: int, bound: float, rounds: int, least_seconds: float,
    expected: Blocks,
) -> Iterator[dict[str, Any]]:
    by_us = partial(ours, corpus, tokenizer, block, bound)
    for way, batched in WAYS.items():
        by_textbook = partial(textbook, corpus, tokenizer, block, bound, batched=batched)
        _check(by_textbook(), expected)
        times = alternate(by_textbook, by_us, rounds=rounds, least_seconds=least_seconds, clock=time.process_time)
        yield {
            "textbook": way, "documents": len(corpus.documents),
            "characters": sum(len(d.text) for d in corpus.documents),
            "blocks": sum(map(len, expected.values())), "tokens": block,
            "textbook_s": float(np.median(times.first)), "ours_s": float(np.median(times.second)),
            "ratio": float(np.median(times.ratios)), "lowest": min(times.ratios), "highest": max(times.ratios),
            "rounds": rounds,
        }


def ours(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, block: int, bound: float) -> Blocks:
    """Blocks [n, block] of every split and language, by the functions that the study's data set is made with."""
    made = prepare(
        corpus, vocab_size=len(tokenizer), max_diff_percent=bound, common=True, validation_fraction=HELD_OUT,
        test_fraction=HELD_OUT, tokenizer=tokenizer,
    )
    return {key: blocks for key, (blocks, _) in pack_all(made, block).items()}


def textbook(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, block: int, bound: float, *, batched: bool
) -> Blocks:
    """The same blocks, one step after the other.

    Args:
        corpus: documents that exist in several languages. tokenizer: of all of them.
        block: tokens of a block. bound: percent that a language may be larger than the smallest.
        batched: call the tokenizer for a thousand documents at a time, not for each.
    """
    documents = common_only(corpus.documents)
    assigned = split_topics(
        (d.id for d in documents), HELD_OUT, HELD_OUT, DATA_SEED, strata=language_sets(documents)
    )
    found: dict[tuple[str, str], np.ndarray] = {}
    for split in SPLITS:
        own = {code: [d for d in corpus.of_language(code) if assigned.get(d.id) == split] for code in corpus.languages}
        for code, texts in balanced(own, tokenizer, bound).items():
            order = seeded_order(texts, DATA_SEED, f"pack {code}")
            found[split, code] = grouped([texts[key] for key in order], tokenizer, block, batched=batched)
    return found


def balanced(
    documents: Mapping[str, Sequence[Document]], tokenizer: PreTrainedTokenizerFast, bound: float
) -> dict[str, dict[str, str]]:
    """Language -> id -> text, cut at the end of units until each language is within ``bound`` percent of the smallest.

    Every step cuts the document that is the longest then, and tokenizes what is left of it.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2

    sizes = {code: [count(d.text) for d in own] for code, own in documents.items()}
    floor = min(map(sum, sizes.values()))
    found = {}
    for code, own in documents.items():
        texts, lengths = [d.text for d in own], sizes[code]
        ends = [prefix_lengths(text, code) for text in texts]
        divisible = {i for i, places in enumerate(ends) if len(places) > 1}
        while sum(lengths) > (1 + bound / 100) * floor and divisible:
            longest = max(divisible, key=lambda i: (lengths[i], -i))  # noqa: B023 - used at once
            shorter = texts[longest][: ends[longest][-2]]
            length = count(shorter)
            if sum(lengths) - lengths[longest] + length < floor:
                divisible.remove(longest)
                continue
            texts[longest], lengths[longest] = shorter, length
            ends[longest].pop()
            if len(ends[longest]) == 1:
                divisible.remove(longest)
        found[code] = {d.id: text for d, text in zip(own, texts, strict=True)}
    return found


def grouped(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, block: int, *, batched: bool
) -> np.ndarray:
    """Texts between ``<s>`` and ``</s>``, end to end, cut into blocks [n, block], by two ``map`` of ``datasets``."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[bos, *own, eos] for own in ids] if batched else [bos, *ids, eos]}

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(rows["input_ids"]))
        whole = len(joined) // block * block
        return {"input_ids": [joined[i : i + block] for i in range(0, whole, block)]}

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        read = datasets.Dataset.from_dict({"text": list(texts)}).map(
            tokenize, batched=batched, remove_columns=["text"], load_from_cache_file=False
        )
        # One batch of all: a batch's last tokens are left out, and ours leaves out those of a language alone.
        cut = read.map(group_texts, batched=True, batch_size=len(read), load_from_cache_file=False)
    finally:
        if shown:
            datasets.enable_progress_bars()
    return np.array(cut["input_ids"][:], dtype=np.int32)


def _check(found: Blocks, expected: Blocks) -> None:
    for key, blocks in expected.items():
        if not np.array_equal(found[key], blocks):
            raise MomeError(
                f"The textbook's {' blocks of '.join(key)} are others than ours: their times mean nothing until that "
                "is repaired. (With few topics a balance may need more than cutting: take more, or a wider bound.)"
            )
