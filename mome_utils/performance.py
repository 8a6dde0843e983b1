"""The performance table of the README: ratios of the stored benchmarks, each with the spread of its rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_utils.config import MomeError

__all__ = ["BENCHMARK_FOLDER", "performance_block", "with_performance"]

BENCHMARK_FOLDER = "data/benchmarks"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

Row = Mapping[str, Any]
Line = tuple[str, str, str]
"""What was measured, beside what, and how they compare."""


def performance_block(root: Path) -> str:
    """All stored benchmarks that compare two ways to do the same work, as Markdown.

    Args:
        root: the checkout.
    """
    lines = ["| Measured | Beside | Result: median of the rounds (lowest to highest) |", "|---|---|---:|"]
    machines = set()
    for name, describe in _BENCHMARKS.items():
        path = root / BENCHMARK_FOLDER / f"{name}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["machine"]
        machines.add(f"{found['processor']}, {found['cores']} cores, torch {found['torch']}")
        lines += [f"| {what} (`{name}`) | {beside} | {result} |" for what, beside, result in describe(content["rows"])]
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(machines))}."])


def with_performance(readme: str, block: str) -> str:
    """``readme`` with the text between its two performance markers replaced.

    Raises:
        MomeError: it has no such markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MomeError(f"README.md needs the lines {BEGIN} and {END} to put the benchmarks between.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _times(row: Row, word: str = "faster") -> str:
    return f"{row['ratio']:.3g} × {word} ({row['lowest']:.3g} to {row['highest']:.3g})"


def _training(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        what, beside = (row[side].replace("kd,", "distillation,").replace("ce,", "cross-entropy,")
                        for side in ("measured", "against"))
        # Operations of a token, both in the same unit: a rate over the tokens at that rate.
        saved = (row["against_matrix_rate"] / row["against_tokens_per_s"]) / (row["matrix_rate"] / row["tokens_per_s"])
        fewer = f" with {saved:.2g} × fewer operations" if abs(saved - 1) > 0.01 else ""
        yield f"a step of {what}", beside, f"{_times(row)}{fewer}, {row['matrix_rate']:.0%} of the matrix rate"


def _large(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        what = {"kd": "distillation", "ce": "cross-entropy"}[row["measured"].partition(",")[0]]
        yield (f"memory of a step of {what}, vocabulary 32,000, 8 × 1,024 tokens", "the textbook's step",
               f"1/{row['memory_ratio']:.3g} of the memory, {row['ratio']:.3g} × faster")


def _sweep(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield (f"a sweep of {row['runs']} runs, {row['workers']} side by side, caching included",
               "the textbook's loop, one run after the other", _times(row))


def _router(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield (f"routing {row['sequences']} sequences, vocabulary {row['vocabulary']:,}", "the published pipeline",
               _times(row))


def _moe(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        if row["work"] == "training" and row["layers"] == min(other["layers"] for other in rows):
            name = {"none": "one model without experts"}.get(row["variant"], row["variant"])
            yield (f"a training step of {name} on a batch of all languages", "a batch for each language",
                   _times(row, "the time"))


def _dataset(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield (f"{row['documents']:,} documents balanced and in blocks",
               f"the textbook's way, tokenized {row['textbook']}", _times(row))


def _generate(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield (f"{row['variant']} continues prompts of all languages, {row['prompts']} at once",
               "one prompt after the other", _times(row))


def _gpu(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        what = f"{row['measured']} on {row['device']}"
        if row["against"] == "itself":
            yield what, "the device's own rate of matrix products", f"{row['matrix_rate']:.0%}"
        else:
            yield what, row["against"], _times(row)


_BENCHMARKS: Mapping[str, Callable[[Sequence[Row]], Iterator[Line]]] = {
    "kd": _training, "ce": _training, "sweep": _sweep, "large": _large, "router": _router, "moe": _moe,
    "dataset": _dataset, "generate": _generate, "gpu": _gpu,
}
