"""The tables of the comparison of mixtures: what an arm scores and costs, and what its experts are worth.

An *arm* is one way to answer, with rows of scores in the long format of :mod:`mome_utils.evaluation` (``seed``,
``language``, ``document``, ``nats``, ``bytes``, ``tokens``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from mome_utils.bench import alternate
from mome_utils.config import MomeError
from mome_utils.evaluation import Interval, bits_per_byte, interval, paired_interval

__all__ = [
    "MEAN", "advantages", "against", "intervals_by_arm", "relative_times", "saved_rows", "scores_by_arm", "text_of",
]

#: The row of a table that is the mean over languages.
MEAN = "mean"
KEYS = ["seed", "language", "document"]


def text_of(effect: Interval, digits: int = 3) -> str:
    """An effect with its sign and limits, for a table's cell: ``+0.012 [−0.003, +0.027]``."""
    middle, low, high = (f"{v:+.{digits}f}".replace("-", "−") for v in (effect.estimate, effect.low, effect.high))
    return f"{middle} [{low}, {high}]"


def scores_by_arm(arms: Mapping[str, pd.DataFrame], languages: Sequence[str]) -> pd.DataFrame:
    """Bits per byte of each arm (rows, in order) by language and in the mean (columns), averaged over seeds."""
    rows = pd.concat([bits_per_byte(table, ["seed"]).assign(arm=arm) for arm, table in arms.items()])
    wide = rows.pivot_table(index="arm", columns="language", values="bits_per_byte", sort=False)
    return wide.loc[list(arms), [*languages, MEAN]]


def against(arms: Mapping[str, pd.DataFrame], reference: str, languages: Sequence[str]) -> pd.DataFrame:
    """Differences in bits per byte from the reference arm, paired by seed and document, below zero where better.

    Returns:
        One row per arm and language (and `MEAN`, the difference of means): arm, language, estimate, low, high. The
        reference itself has none.

    Raises:
        MomeError: there is no such arm.
    """
    if reference not in arms:
        raise MomeError(f"There is no arm '{reference}' to compare with: the arms are {', '.join(arms)}.")
    found = []
    for arm, rows in arms.items():
        if arm == reference:
            continue
        for language in (*languages, MEAN):
            pair = [t if language == MEAN else t[t["language"] == language] for t in (rows, arms[reference])]
            effect = paired_interval(*pair)
            found.append({"arm": arm, "language": language, "estimate": effect.estimate, "low": effect.low,
                          "high": effect.high})
    return pd.DataFrame(found)


def advantages(scores: pd.DataFrame, name: str, languages: Sequence[str]) -> pd.DataFrame:
    """What the right expert saves against the mean of the wrong ones, by language and in the mean.

    Args:
        scores: long rows of one mixture with a column ``setting``.
        name: what the setting of one expert is called, such as ``"{} alone"``.
        languages: of the experts.

    Returns:
        language, estimate (bits per byte, above zero where the right expert is better), low, high.
    """
    right, wrong = _right_and_wrong(scores, name, languages)
    return against({"wrong": wrong, "right": right}, "right", languages).drop(columns="arm")


def saved_rows(scores: pd.DataFrame, name: str, languages: Sequence[str]) -> pd.DataFrame:
    """The advantage of :func:`advantages` document by document, so that two mixtures' advantages can be paired.

    Returns:
        Long rows whose nats are those of the mean of the wrong experts minus the right one's: seed, language,
        document, nats, bytes, tokens. Their bits per byte are the advantage, and
        :func:`mome_utils.evaluation.paired_interval` of two such tables is the difference of two advantages.
    """
    right, wrong = _right_and_wrong(scores, name, languages)
    both = right[[*KEYS, "nats", "bytes", "tokens"]].merge(wrong[[*KEYS, "nats"]], on=KEYS, suffixes=("", "_wrong"))
    return both.assign(nats=both["nats_wrong"] - both["nats"]).drop(columns="nats_wrong")


def _right_and_wrong(
    scores: pd.DataFrame, name: str, languages: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of each document under its own language's expert, and of the mean over the other experts."""
    own, wrong = [], []
    for expert in languages:
        rows = scores[scores["setting"] == name.format(expert)]
        own.append(rows[rows["language"] == expert])
        wrong.append(rows[(rows["language"] != expert) & rows["language"].isin(languages)])
    mean_of_wrong = pd.concat(wrong).groupby(KEYS, as_index=False)[["nats", "bytes", "tokens"]].mean()
    return pd.concat(own, ignore_index=True), mean_of_wrong


def relative_times(
    functions: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 5,
    least_seconds: float = 0.01,
    clock: Callable[[], float] = time.process_time,
) -> pd.DataFrame:
    """How many times as long as the baseline each function takes, each timed in turn with it.

    Args:
        functions: by name; each does the same amount of work (the same tokens), and takes nothing.
        baseline: one of the names.
        rounds, least_seconds, clock: see :func:`mome_utils.bench.alternate`. Processor time of this process by
            default, which other work on the machine disturbs least.

    Returns:
        arm, ratio (median over the rounds), low and high (smallest and largest round), and seconds of one call
        (median over the rounds, on the machine that measured them); the baseline has ratio 1.

    Raises:
        MomeError: there is no such function.
    """
    if baseline not in functions:
        raise MomeError(f"There is no function '{baseline}' to time against: there are {', '.join(functions)}.")
    rows = []
    for name, function in functions.items():
        timed = alternate(function, functions[baseline], rounds=rounds, least_seconds=least_seconds, clock=clock)
        ratios = [1.0] if name == baseline else list(timed.ratios)
        rows.append({"arm": name, "ratio": float(np.median(ratios)), "low": min(ratios), "high": max(ratios),
                     "seconds": float(np.median(timed.first))})
    return pd.DataFrame(rows)


def intervals_by_arm(arms: Mapping[str, pd.DataFrame], languages: Sequence[str]) -> pd.DataFrame:
    """Each arm's bits per byte with its interval, by language and in the mean: arm, language, estimate, low, high."""
    found = []
    for arm, rows in arms.items():
        for language in (*languages, MEAN):
            own = interval(rows if language == MEAN else rows[rows["language"] == language])
            found.append({"arm": arm, "language": language, "estimate": own.estimate, "low": own.low, "high": own.high})
    return pd.DataFrame(found)
