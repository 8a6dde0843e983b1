"""Verdicts: every direction on both sides of its margin, on it, and across it."""

from __future__ import annotations

import math

import pytest

from mome_utils.claims import CLAIMS, Claim, verdict, verdict_table
from mome_utils.config import MomeError
from mome_utils.intervals import Interval

YES, NO, OPEN = "reproduced", "not reproduced", "undecided at this scale"
MARGIN = 0.1


def claim(direction: str, needs_seeds: bool = True) -> Claim:
    return Claim("X", "statement", "a minus b", direction, MARGIN, "bits per byte", "source", needs_seeds)


def found(low: float, high: float, seeds: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, seeds, 40)


# low, high -> at_most, at_least, greater, less, equal, with a margin of 0.1
TABLE = [
    (-0.30, -0.20, YES, NO, NO, YES, NO),
    (-0.30, -0.10, YES, OPEN, NO, OPEN, OPEN),  # touches -margin
    (-0.10, 0.05, YES, OPEN, NO, OPEN, OPEN),  # begins on -margin
    (-0.20, 0.00, YES, OPEN, NO, OPEN, OPEN),
    (-0.05, 0.05, YES, YES, NO, NO, YES),
    (-0.05, 0.10, OPEN, YES, OPEN, NO, OPEN),  # touches +margin
    (0.00, 0.20, OPEN, YES, OPEN, NO, OPEN),
    (0.10, 0.20, OPEN, YES, OPEN, NO, OPEN),  # begins on +margin
    (0.20, 0.30, NO, YES, YES, NO, NO),
    (-0.30, 0.30, OPEN, OPEN, OPEN, OPEN, OPEN),
    (-math.inf, math.inf, OPEN, OPEN, OPEN, OPEN, OPEN),
]
DIRECTIONS = ("at_most", "at_least", "greater", "less", "equal")


@pytest.mark.parametrize("low, high, expected", [(row[0], row[1], row[2:]) for row in TABLE])
def test_verdict_of_every_direction(low, high, expected):
    interval = Interval(0.0, low, high, 3, 40)
    assert tuple(verdict(claim(d), interval).verdict for d in DIRECTIONS) == expected


def test_mirrored_directions_agree():
    for low, high, *_ in TABLE:
        here, there = Interval(0.0, low, high, 3, 40), Interval(0.0, -high, -low, 3, 40)
        for one, other in [("at_most", "at_least"), ("greater", "less"), ("equal", "equal")]:
            assert verdict(claim(one), here).verdict == verdict(claim(other), there).verdict


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fewer_than_three_seeds_decide_nothing_where_seeds_matter(direction):
    for low, high in [(-0.05, 0.05), (0.2, 0.3), (-0.3, -0.2)]:
        few = verdict(claim(direction), found(low, high, seeds=2))
        assert few.verdict == OPEN and "2 of the 3 seeds" in few.reason
        enough = verdict(claim(direction, needs_seeds=False), found(low, high, seeds=1))
        assert enough.verdict in (YES, NO)


def test_reasons_name_the_side_of_the_margin():
    assert verdict(claim("at_most"), found(-0.2, 0.0)).reason == "the whole interval is below +0.1"
    assert verdict(claim("less"), found(0.2, 0.3)).reason == "the whole interval is above -0.1"
    assert "reaches over the margin of 0.1" in verdict(claim("equal"), found(0.0, 0.3)).reason


def test_a_stage_that_was_not_run_is_never_guessed():
    nothing = verdict(CLAIMS["C1"], None)
    assert nothing.verdict == "not run" and math.isnan(nothing.estimate)


def test_questions_are_answered_by_their_value():
    assert verdict(CLAIMS["N3"], found(0.5, 0.6, seeds=1)).verdict == "measured"


def test_what_is_not_an_interval_is_refused():
    for low, high in [(0.2, 0.1), (math.nan, 0.1)]:
        with pytest.raises(MomeError, match="C1"):
            verdict(CLAIMS["C1"], Interval(0.1, low, high, 3, 40))


def test_the_ledger_holds_the_margins_of_the_specification():
    rules = {name: (c.direction, c.margin) for name, c in CLAIMS.items() if c.direction != "report"}
    assert rules == {
        "C1": ("at_most", 0.01),
        "C2a": ("at_most", 0.01),
        "C2b": ("less", 0.1),
        "C3a": ("at_least", 0.1),
        "C3b": ("at_least", 0.1),
        "C4": ("equal", 0.02),
        "C5a": ("greater", 0.01),
        "C5b": ("less", 0.01),
        "C6": ("greater", 0.1),
        "C7": ("at_most", 0.02),
        "C8": ("at_most", 0.02),
        "C10a": ("greater", 1.0),
        "C10b": ("greater", 1.0),
    }
    assert {"C9", "O1", "O3", "N1", "N2", "N3"} <= set(CLAIMS)
    assert {c.id for c in CLAIMS.values() if not c.needs_seeds} == {"C3a", "C3b", "N1"}
    assert all(name == c.id for name, c in CLAIMS.items())


def test_the_table_keeps_the_ledgers_order_and_refuses_unknown_claims():
    table = verdict_table({"C6": found(0.5, 0.6), "C1": None})
    assert list(table["claim"]) == ["C1", "C6"]
    assert list(table["verdict"]) == ["not run", YES]
    assert verdict_table({}).empty
    with pytest.raises(MomeError, match="no claim 'C99'"):
        verdict_table({"C99": None})
