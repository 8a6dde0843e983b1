"""Schedules: what each kind promises, for any sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mome_utils.schedules import ScheduleError, schedule

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda n: {f"l{i}": k for i, k in enumerate(n)}
)
KINDS = ["balanced", "random", "sequential", "one_language"]


@given(st.sampled_from(KINDS), LENGTHS, st.integers(4, 20), st.integers(1, 3), st.integers(0, 5))
def test_shape_range_and_repeatability(
    kind: Any, lengths: dict[str, int], steps: int, share: int, seed: int
) -> None:
    batch = share * len(lengths)
    made = schedule(kind, lengths, steps=steps, batch_size=batch, seed=seed)
    assert made.shape == (steps, batch, 2) and made.dtype == np.int64
    sizes = np.array(list(lengths.values()))
    assert (
        (made >= 0).all() and (made[..., 0] < len(sizes)).all() and (made[..., 1] < sizes[made[..., 0]]).all()
    )
    assert (made == schedule(kind, lengths, steps=steps, batch_size=batch, seed=seed)).all()


@given(st.sampled_from(KINDS), LENGTHS, st.integers(4, 20), st.integers(0, 5))
def test_nothing_repeats_before_everything_was_seen(
    kind: Any, lengths: dict[str, int], steps: int, seed: int
) -> None:
    made = schedule(kind, lengths, steps=steps, batch_size=len(lengths), seed=seed).reshape(-1, 2)
    for language, size in enumerate(lengths.values()):
        seen = Counter(made[made[:, 0] == language, 1].tolist())
        counts = [seen[b] for b in range(size)]
        assert max(counts) - min(counts) <= 1


@given(LENGTHS, st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_balanced_batches_hold_every_language_equally(
    lengths: dict[str, int], steps: int, share: int, seed: int
) -> None:
    made = schedule("balanced", lengths, steps=steps, batch_size=share * len(lengths), seed=seed)
    for batch in made:
        assert Counter(batch[:, 0].tolist()) == dict.fromkeys(range(len(lengths)), share)


@given(LENGTHS, st.integers(4, 20), st.integers(1, 5))
def test_sequential_visits_languages_in_order_for_equal_shares(
    lengths: dict[str, int], steps: int, batch: int
) -> None:
    made = schedule("sequential", lengths, steps=steps, batch_size=batch, seed=0)
    turns = made[:, 0, 0]
    assert (made[..., 0] == turns[:, None]).all() and (np.diff(turns) >= 0).all()
    shares = np.bincount(turns, minlength=len(lengths))
    assert shares.max() - shares.min() <= 1


@given(LENGTHS, st.integers(1, 20), st.integers(1, 5), st.integers(0, 5))
def test_one_language_batches_rotate(lengths: dict[str, int], steps: int, batch: int, seed: int) -> None:
    made = schedule("one_language", lengths, steps=steps, batch_size=batch, seed=seed)
    turns = made[:, 0, 0]
    assert (made[..., 0] == turns[:, None]).all()
    count = len(lengths)
    for start in range(0, steps - count + 1, count):
        assert sorted(turns[start : start + count]) == list(range(count))


def test_random_draws_from_the_pool_in_proportion() -> None:
    made = schedule("random", {"a": 30, "b": 10}, steps=4, batch_size=10, seed=0)
    assert Counter(made[..., 0].ravel().tolist()) == {0: 30, 1: 10}


def test_a_seed_changes_the_order_and_languages_differ() -> None:
    first, second = (schedule("balanced", {"a": 50, "b": 50}, steps=50, batch_size=2, seed=s) for s in (0, 1))
    assert (first != second).any()
    assert (first[:, 0, 1] != first[:, 1, 1]).any()


def test_a_longer_schedule_begins_like_a_shorter_one() -> None:
    for kind in ("balanced", "random", "one_language"):
        short, long = (
            schedule(kind, {"a": 5, "b": 7}, steps=n, batch_size=2, seed=3)  # type: ignore[arg-type]
            for n in (6, 40)
        )
        assert (long[:6] == short).all()


@pytest.mark.parametrize(
    ("kind", "lengths", "steps", "batch", "word"),
    [
        ("balanced", {"a": 3, "b": 3}, 2, 3, "multiple of 2"),
        ("balanced", {"a": 3, "b": 0}, 2, 2, "at least one block"),
        ("random", {}, 2, 2, "at least one block"),
        ("random", {"a": 3}, 0, 2, "at least one step"),
        ("sequential", {"a": 3, "b": 3}, 1, 2, "too few"),
        ("shuffled", {"a": 3}, 1, 1, "shuffled"),
    ],
)
def test_what_cannot_be_made_is_refused(
    kind: Any, lengths: dict[str, int], steps: int, batch: int, word: str
) -> None:
    with pytest.raises(ScheduleError, match=word):
        schedule(kind, lengths, steps=steps, batch_size=batch, seed=0)
