"""``mome bench generate``: a batch of prompts in several languages at once, against a textbook's loop over prompts.

*The textbook* keeps the experts as plain GPT-2 models in a dictionary, as the published code does, and takes one
prompt after the other: it writes the ids as words, asks the published pipeline (TF-IDF and logistic regression) for
the language, and calls ``generate`` of that expert. *Ours* is one call of the mixture's ``generate`` for all prompts,
padded to one length: its router is compiled from the same pipeline, each sequence goes to its expert, and one cache
holds all keys and values. Both hold all weights in memory and write the same tokens, which is checked first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor

from mome_utils.bench import alternate, one_thread
from mome_utils.bench_moe import expert_alone
from mome_utils.config import MomeError, Shape
from mome_utils.corpus import load_corpus
from mome_utils.memory import keep_freed_memory
from mome_utils.moe import MomeForCausalLM, build_mome
from mome_utils.router_fit import from_sklearn, words
from mome_utils.sweeps import quiet
from mome_utils.tokenization import encode, train_tokenizer

__all__ = ["generate"]

BOS, EOS = 1, 2


def generate(
    *,
    root: Path,
    rounds: int = 5,
    prompts: Sequence[int] = (1, 8, 32),
    new_tokens: int = 48,
    variants: Sequence[str] = ("ple", "jeet"),
    shape: Shape = Shape(2, 96, 2),  # noqa: B008 - frozen
    vocabulary: int = 2048,
    block: int = 128,
    topics: int | None = 120,
    least_seconds: float = 0.2,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Greedy generation from prompts of different lengths and languages: all at once, against one by one.

    The prompts are beginnings of the corpus's documents, the languages in turn; the routers are fitted on other
    documents. Weights are untrained: they cost what trained ones do. One thread; what is counted is the time that the
    process computes, with memory that it keeps (:func:`~mome_utils.memory.keep_freed_memory`).

    Args:
        root: the project's folder, which holds the corpus.
        rounds: how often each has its turn.
        prompts: numbers of prompts to try.
        new_tokens: to generate for each. variants: of the mixture, with experts that a plain GPT-2 can be.
        shape, vocabulary, block: of the mixture; by default the laptop study's.
        topics: of the corpus; ``None`` takes all.
        least_seconds: see :func:`~mome_utils.bench.alternate`. seed: of weights.

    Returns:
        Rows, each as soon as it is measured: milliseconds for each generated token of both (medians over the rounds)
        and the ratio textbook / ours (median, lowest and highest round).

    Raises:
        MomeError: the two write different tokens, or too few documents or too short a block for the prompts.
    """
    if rounds < 1 or new_tokens < 1 or not prompts or min(prompts) < 1:
        raise MomeError("A benchmark of generation needs one round, one prompt and one new token or more.")
    if block < 2 * new_tokens:
        raise MomeError(f"A block of {block} tokens has no room for {new_tokens} new ones behind prompts as long.")
    quiet()
    keep_freed_memory()
    asked, fitted, languages = _texts(root, topics, vocabulary, max(prompts), block - new_tokens)
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    pipeline.fit(words([ids for own in fitted for ids in own]), np.repeat(range(len(fitted)), list(map(len, fitted))))
    return _rows(
        pipeline, asked, languages, variants, prompts, new_tokens, shape, vocabulary, block, rounds, least_seconds, seed
    )


def _rows(
    pipeline: Pipeline, asked: Sequence[Tensor], languages: Sequence[str], variants: Sequence[str],
    prompts: Sequence[int], new_tokens: int, shape: Shape, vocabulary: int, block: int, rounds: int,
    least_seconds: float, seed: int,
) -> Iterator[dict[str, Any]]:
    for variant in variants:
        model = build_mome(
            variant, shape, vocab_size=vocabulary, block_size=block, languages=languages, seed=seed, bos=BOS, eos=EOS
        ).eval()
        if model.common is not None:
            raise MomeError(f"The experts of '{variant}' answer together with a common one: choose ple or jeet.")
        model.set_router(from_sklearn(pipeline[0], pipeline[1], languages, vocab_size=vocabulary))
        experts = {place: expert_alone(model, shape, seed, place=place) for place in range(len(languages))}
        for count in prompts:
            batch = asked[:count]

            def one_by_one(
                experts: Mapping[int, Any] = experts, batch: Sequence[Tensor] = batch
            ) -> list[list[int]]:
                return textbook(pipeline, experts, batch, new_tokens)

            def at_once(model: MomeForCausalLM = model, batch: Sequence[Tensor] = batch) -> list[list[int]]:
                return ours(model, batch, new_tokens)

            with one_thread():
                _check(one_by_one, at_once)
                times = alternate(
                    one_by_one, at_once, rounds=rounds, least_seconds=least_seconds, clock=time.process_time
                )
            by_textbook, by_ours = (
                1000 / (count * new_tokens) * float(np.median(seconds)) for seconds in (times.first, times.second)
            )
            yield {
                "variant": variant, "layers": shape.layers, "width": shape.width, "vocabulary": vocabulary,
                "prompts": count, "new_tokens": new_tokens, "textbook_ms": by_textbook, "ours_ms": by_ours,
                "ratio": float(np.median(times.ratios)), "lowest": min(times.ratios), "highest": max(times.ratios),
                "rounds": rounds,
            }


def textbook(
    pipeline: Pipeline, experts: Mapping[int, Any], batch: Sequence[Tensor], new_tokens: int
) -> list[list[int]]:
    """New tokens of each prompt [T]: the pipeline names the expert, and its ``generate`` is called, prompt by prompt.

    Args:
        pipeline: of ids written as words. experts: plain GPT-2 models by label. batch: ids of each prompt.
        new_tokens: to generate for each, greedily.
    """
    found = []
    for ids in batch:
        expert = experts[int(pipeline.predict([" ".join(map(str, ids.tolist()))])[0])]
        row = ids[None]
        whole = expert.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        )
        found.append(whole[0, len(ids) :].tolist())
    return found


def ours(model: MomeForCausalLM, batch: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    """The same from one call of the mixture, prompts padded on the left."""
    length = max(map(len, batch))
    rows = torch.full((len(batch), length), EOS)
    mask = torch.zeros_like(rows)
    for place, ids in enumerate(batch):
        rows[place, length - len(ids) :] = ids
        mask[place, length - len(ids) :] = 1
    whole: Tensor = model.generate(
        rows, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=EOS
    )
    found: list[list[int]] = whole[:, length:].tolist()
    return found


def _check(first: Callable[[], list[list[int]]], second: Callable[[], list[list[int]]]) -> None:
    different = sum(a != b for a, b in zip(first(), second(), strict=True))
    if different:
        raise MomeError(
            f"The mixture continues {different} prompts otherwise than its experts do alone: its times mean nothing "
            "until that is repaired."
        )


def _texts(
    root: Path, topics: int | None, vocabulary: int, count: int, longest: int
) -> tuple[list[Tensor], list[list[np.ndarray]], tuple[str, ...]]:
    """Prompts [T] of different lengths, languages in turn; per language ids of other documents; and the languages."""
    corpus = load_corpus("embedded", topics=topics, root=root)
    tokenizer = train_tokenizer([document.text for document in corpus.documents], vocabulary)
    read = {
        language: [np.array(ids) for ids in encode(tokenizer, [d.text for d in corpus.of_language(language)])]
        for language in corpus.languages
    }
    each = -(-count // len(read))
    if min(map(len, read.values())) <= each:
        raise MomeError(f"The corpus has too few documents for {count} prompts: ask for fewer, or take more topics.")
    asked = []
    for i in range(count):
        own = list(read.values())[i % len(read)][i // len(read)]
        asked.append(torch.from_numpy(own[: longest - (7 * i) % (longest // 2)]))
    return asked, [own[each:] for own in read.values()], corpus.languages
