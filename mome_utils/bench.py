"""Named benchmarks, ``mome bench NAME``: what a part of the package costs next to what it replaces.

Two ways to do the same work are timed in turn, A B A B …, in one process (training in one warm process for each,
see :mod:`mome_utils.bench_sides`): a machine that slows down slows both, and each round gives one ratio. A benchmark
whose sides do the same sums checks first that both give the same result, then returns one row per setting;
:func:`run_benchmark` adds what machine it ran on. Times are not tests: nothing fails because it is slow.

A benchmark is a function that takes ``root`` and ``rounds`` and returns rows, or gives them one by one where it takes
long; :data:`BENCHMARKS` names it.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from mome_utils.artifacts import write_atomic
from mome_utils.config import MomeError
from mome_utils.corpus import Corpus, load_corpus
from mome_utils.router_fit import from_sklearn
from mome_utils.routing import TokenRouter
from mome_utils.tokenization import encode, train_tokenizer

__all__ = [
    "BENCHMARKS", "Alternation", "alternate", "machine", "moe", "one_thread", "router", "run_benchmark",
    "sentence", "table",
]

@dataclass(frozen=True)
class Alternation:
    """Seconds per call of two functions, timed in turn.

    Attributes:
        first, second: one number per round.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times longer the first took, in each round."""
        return tuple(a / b for a, b in zip(self.first, self.second, strict=True))


def alternate(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    rounds: int,
    least_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> Alternation:
    """Time two functions in turn.

    Each is called twice to warm up, and then in each round as many times as fill ``least_seconds``, so that a
    short call is timed as exactly as a long one.

    Args:
        first, second: what to time; they take nothing.
        rounds: how often each has its turn.
        least_seconds: time that a turn should fill.
        clock: seconds. ``time.process_time`` counts the work of this process alone, whatever else the machine does.

    Raises:
        MomeError: fewer rounds than one.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    calls = []
    for function in (first, second):
        function()
        start = clock()
        function()
        calls.append(max(1, round(least_seconds / max(clock() - start, 1e-9))) if least_seconds else 1)

    def turn(function: Callable[[], object], number: int) -> float:
        start = clock()
        for _ in range(number):
            function()
        return (clock() - start) / number

    seconds = [(turn(first, calls[0]), turn(second, calls[1])) for _ in range(rounds)]
    return Alternation(tuple(a for a, _ in seconds), tuple(b for _, b in seconds))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread in this block, and with as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """The processor and the versions that a time depends on; no name of a host, a user or a folder."""
    flags: set[str] = set()
    processor = platform.machine()
    description = Path("/proc/cpuinfo")
    if description.is_file():
        for line in description.read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "flags":
                flags |= set(value.split())
            elif key == "model name":
                processor = value
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "processor": processor, "cores": os.cpu_count(), "flags": [name for name in wanted if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
    } | {name: version(name) for name in ("numpy", "scipy", "scikit-learn", "torch")}


def router(
    *,
    root: Path,
    rounds: int = 7,
    vocabularies: Sequence[int] = (4096, 32_000),
    sequences: int = 256,
    length: int = 1024,
    topics: int | None = None,
    least_seconds: float = 0.2,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The published router (ids written as words, TF-IDF, logistic regression) against :class:`TokenRouter`.

    Both start from the same ids in memory and end with one decision per sequence. The ids are the embedded corpus,
    in the tokens of a tokenizer trained on it; the fit has as much text of each language, and none of the batch.
    Both use one thread (the published pipeline has no parallel part), and what is counted is the time that the
    process computes.

    Args:
        root: the project's folder, which holds the corpus.
        rounds: how often each has its turn.
        vocabularies: numbers of token ids to try. sequences: in the batch. length: of each, in tokens.
        topics: of the corpus; ``None`` takes all.
        least_seconds: see :func:`alternate`. seed: of the order of the batch.

    Returns:
        For each vocabulary: milliseconds for the batch (medians over the rounds), the ratio published / TokenRouter
        (median, lowest and highest round), and the largest difference between their logits.

    Raises:
        MomeError: the two decide differently, or their logits differ by more than 1e-5; or too little text.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    corpus = load_corpus("embedded", topics=topics, root=root)
    rows = []
    for vocabulary in vocabularies:
        published, batch = _published(corpus, vocabulary, sequences, length, seed)
        compiled = from_sklearn(published[0], published[1], corpus.languages, vocab_size=vocabulary)
        difference = _checked_difference(published, compiled, batch)

        def by_words(published: Pipeline = published, batch: torch.Tensor = batch) -> object:
            return published.predict(_as_words(batch))

        def by_tensors(compiled: TokenRouter = compiled, batch: torch.Tensor = batch) -> object:
            return compiled.route(batch)

        with one_thread():
            times = alternate(
                by_words, by_tensors, rounds=rounds, least_seconds=least_seconds, clock=time.process_time
            )
        rows.append({
            "vocabulary": vocabulary, "sequences": len(batch), "tokens": length,
            "published_ms": 1000 * float(np.median(times.first)), "router_ms": 1000 * float(np.median(times.second)),
            "ratio": float(np.median(times.ratios)), "lowest": min(times.ratios), "highest": max(times.ratios),
            "logit_difference": difference, "rounds": rounds,
        })
    return rows


def _published(
    corpus: Corpus, vocabulary: int, sequences: int, length: int, seed: int
) -> tuple[Pipeline, torch.Tensor]:
    """The pipeline as released, and a batch [sequences, length] of ids in text that it was not fitted on."""
    tokenizer = train_tokenizer([document.text for document in corpus.documents], vocabulary)
    each = sequences // len(corpus.languages)
    training, batch = [], []
    for language in corpus.languages:
        ids = np.concatenate(encode(tokenizer, [document.text for document in corpus.of_language(language)]))
        rows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int64)
        if len(rows) <= each or each < 1:
            raise MomeError(
                f"The corpus has {len(rows)} sequences of {length} tokens in {language}, too few for a batch of "
                f"{sequences} and a fit: ask for fewer or shorter ones, but for one in each language at least."
            )
        batch.append(rows[:each])
        training.append(rows[each:])
    smallest = min(map(len, training))
    texts = [text for rows in training for text in _as_words(torch.from_numpy(rows[:smallest]))]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    pipeline.fit(texts, np.repeat(np.arange(len(training)), smallest))
    return pipeline, torch.from_numpy(np.random.default_rng(seed).permutation(np.concatenate(batch)))


def _as_words(batch: torch.Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in batch.tolist()]


def _checked_difference(published: Pipeline, compiled: TokenRouter, batch: torch.Tensor) -> float:
    """The largest difference between the logits, after a check that the decisions are equal."""
    texts = _as_words(batch)
    difference = float(np.abs(published.decision_function(texts) - compiled(batch).numpy()).max())
    different = int((published.predict(texts) != compiled.route(batch).numpy()).sum())
    if different or difference > 1e-5:
        raise MomeError(
            f"The router decides differently from the published pipeline on {different} of {len(batch)} sequences, "
            f"with logits up to {difference:.1e} apart: its times mean nothing until that is repaired."
        )
    return difference


def moe(**options: Any) -> Iterator[dict[str, Any]]:
    """Mixed batches and routed tokens next to plain ones: see :func:`mome_utils.bench_moe.moe`."""
    from mome_utils import bench_moe  # it stands on this module

    return bench_moe.moe(**options)


def similarity(**options: Any) -> list[dict[str, Any]]:
    """Time and memory of every measure of similarity: :func:`mome_utils.bench_similarity.similarity`."""
    from mome_utils.bench_similarity import similarity as measured

    return measured(**options)


def kd(**options: Any) -> list[dict[str, Any]]:
    """Distillation with a cached teacher next to a textbook's loop: :func:`mome_utils.bench_kd.kd`."""
    from mome_utils import bench_kd

    return bench_kd.kd(**options)


def ce(**options: Any) -> list[dict[str, Any]]:
    """Language modelling next to a textbook's loop: :func:`mome_utils.bench_kd.ce`."""
    from mome_utils import bench_kd

    return bench_kd.ce(**options)


def large(**options: Any) -> list[dict[str, Any]]:
    """Memory at a large vocabulary next to a textbook's loop: :func:`mome_utils.bench_kd.large`."""
    from mome_utils import bench_kd

    return bench_kd.large(**options)


def sweep(**options: Any) -> list[dict[str, Any]]:
    """Six runs and their caches next to six textbook runs: :func:`mome_utils.bench_sweep.sweep`."""
    from mome_utils import bench_sweep

    return bench_sweep.sweep(**options)


def dataset(**options: Any) -> Iterator[dict[str, Any]]:
    """Making the data set next to a textbook's way: :func:`mome_utils.bench_dataset.dataset`."""
    from mome_utils.bench_dataset import dataset as measured

    return measured(**options)


def generate(**options: Any) -> Iterator[dict[str, Any]]:
    """Texts of several languages in a batch next to one by one: :func:`mome_utils.bench_generate.generate`."""
    from mome_utils.bench_generate import generate as measured

    return measured(**options)


def gpu(**options: Any) -> list[dict[str, Any]]:
    """Training at the sizes of the profile ``gpu``, on one: see :func:`mome_utils.bench_gpu.gpu`."""
    from mome_utils import bench_gpu

    return bench_gpu.gpu(**options)


#: Name to function; each takes ``root``, the project's folder, and ``rounds``, and gives rows.
BENCHMARKS: Mapping[str, Callable[..., Iterable[dict[str, Any]]]] = MappingProxyType({
    "router": router, "moe": moe, "similarity": similarity, "kd": kd, "ce": ce, "large": large, "sweep": sweep,
    "dataset": dataset, "generate": generate, "gpu": gpu,
})


def run_benchmark(
    name: str, out: Path, *, tell: Callable[[Mapping[str, Any]], object] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Run a benchmark and write its rows, with the machine, as JSON.

    Args:
        name: one of :data:`BENCHMARKS`. out: the file to write. options: passed to the benchmark.
        tell: called with each row as soon as it is measured, by a benchmark that gives them one by one.

    Returns:
        Its rows.

    Raises:
        MomeError: no benchmark of this name, or what the benchmark raises.
    """
    if name not in BENCHMARKS:
        raise MomeError(f"There is no benchmark '{name}': choose one of {', '.join(BENCHMARKS)}.")
    if out.is_dir():
        raise MomeError(f"'{out}' is a folder: name a file to write the benchmark to.")
    rows, given = [], BENCHMARKS[name](**options)
    for row in given:
        rows.append(row)
        if tell is not None and isinstance(given, Iterator):
            tell(row)
    rounded = [{key: _short(value) for key, value in row.items()} for row in rows]
    content = {"benchmark": name, "machine": machine(), "rows": rounded}
    write_atomic(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table of text, numbers right-aligned."""
    cells = [[name.replace("_", " ") for name in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def sentence(row: Mapping[str, Any]) -> str:
    """One row in one line, its names with it."""
    return ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in row.items())


def _cell(value: Any) -> str:
    return f"{_short(value):,}" if isinstance(value, int | float) else str(value)


def _short(value: Any) -> Any:
    """Four significant digits of a number with a fraction; whole numbers and words as they are."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
