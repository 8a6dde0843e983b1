"""The ledger: what was published, the comparison that tests it, and a verdict computed from the numbers.

A claim is data. Its margin is the size of effect that counts as nothing, so every verdict is one of
equivalence or superiority: reproduced if the whole interval lies on the claim's side of its margin, not
reproduced if the whole interval lies on the other side, and undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from types import MappingProxyType
from typing import Literal

import pandas as pd

from mome_utils.config import MomeError
from mome_utils.intervals import Interval

__all__ = ["CLAIMS", "Claim", "Direction", "Outcome", "Verdict", "verdict", "verdict_table"]

Direction = Literal["at_most", "at_least", "greater", "less", "equal", "report"]
Outcome = Literal["reproduced", "not reproduced", "undecided at this scale", "not run", "measured"]

#: Fewer seeds than this say too little about the spread between seeds.
FEWEST_SEEDS = 3

_MOME = "Al-Maamari, Ben Amor & Granitzer 2024, arXiv 2407.19610"
_SIMILARITY = "Klabunde, Ben Amor, Granitzer & Lemmerich 2023, arXiv 2312.02730"
_POSITION = "Ben Amor, Granitzer & Mitrović 2023, arXiv 2304.13567"
_QUESTION = f"question left open by {_MOME}"
_REVIEW = f"check asked for by reviewers of {_MOME}"
_BPB = "bits per byte"


@dataclass(frozen=True)
class Claim:
    """One line of the ledger.

    id, statement: as published, in our words. comparison: the effect that is measured, in `unit`, with the
    sign that the direction refers to. direction and margin m: what the 95 % interval of the effect must show,

    ========  ==================================  ==================================
    direction  reproduced                          not reproduced
    ========  ==================================  ==================================
    at_most    high < +m                           low > +m
    at_least   low > -m                            high < -m
    greater    low > +m                            high < +m
    less       high < -m                           low > -m
    equal      -m < low and high < +m              low > +m or high < -m
    report     (no verdict rule: the value itself is the answer)
    ========  ==================================  ==================================

    needs_seeds: whether the effect varies between trainings, so that fewer than three seeds decide nothing.
    """

    id: str
    statement: str
    comparison: str
    direction: Direction
    margin: float
    unit: str
    source: str
    needs_seeds: bool = True


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim, with the numbers; limits are nan where nothing was run."""

    claim: str
    verdict: Outcome
    estimate: float
    low: float
    high: float
    seeds: int
    documents: int
    reason: str


_LEDGER = (
    Claim(
        "C1",
        "Adaptive α is no worse than a fixed α, and marginally better.",
        "published adaptive α minus fixed α of one half",
        "at_most",
        0.01,
        _BPB,
        _MOME,
    ),
    Claim(
        "C2a",
        "Combining both losses is at least as good as alternating between them.",
        "combined loss minus loss alternating at every step",
        "at_most",
        0.01,
        _BPB,
        _MOME,
    ),
    Claim(
        "C2b",
        "Combining both losses is more stable than alternating.",
        "step-to-step variance of combined over alternating, minus one",
        "less",
        0.1,
        "ratio minus one",
        _MOME,
    ),
    Claim(
        "C3a",
        "The router reaches 99.95 % precision, recall and F1.",
        "F1 at full blocks, cross-validated by document, minus 99.95",
        "at_least",
        0.1,
        "points",
        _MOME,
        needs_seeds=False,
    ),
    Claim(
        "C3b",
        "Logistic regression is the best routing classifier.",
        "F1 of logistic regression minus F1 of the best other classifier",
        "at_least",
        0.1,
        "points",
        _MOME,
        needs_seeds=False,
    ),
    Claim(
        "C4",
        "PLE and JEET perform alike.",
        "PLE minus JEET, equal depth and width",
        "equal",
        0.02,
        _BPB,
        _MOME,
    ),
    Claim(
        "C5a",
        "MoE-CE is slightly worse than PLE and JEET.",
        "MoE-CE without its common expert minus JEET",
        "greater",
        0.01,
        _BPB,
        _MOME,
    ),
    Claim(
        "C5b",
        "Including the common expert improves MoE-CE.",
        "MoE-CE with its common expert minus without",
        "less",
        0.01,
        _BPB,
        _MOME,
    ),
    Claim(
        "C6",
        "Training on one language after the other forgets strongly.",
        "first language: final minus best, sequential training",
        "greater",
        0.1,
        _BPB,
        _MOME,
    ),
    Claim(
        "C7",
        "A single session with balanced batches does not forget.",
        "final minus best during training, mean over languages, single session",
        "at_most",
        0.02,
        _BPB,
        _MOME,
    ),
    Claim(
        "C8",
        "The mixture of experts keeps every language.",
        "final minus best after earlier stages, mean over earlier languages, routed",
        "at_most",
        0.02,
        _BPB,
        _MOME,
    ),
    Claim(
        "C9",
        "Models of one size can differ a lot in their representations, and raw similarity scores mislead.",
        "share of model pairs below the similarity between two seeds of one model",
        "report",
        0.0,
        "share",
        _SIMILARITY,
    ),
    Claim(
        "C10a",
        "Token classifiers lose F1 at positions that training never showed.",
        "F1 at the first copy minus F1 at the last copy of a duplicated sentence",
        "greater",
        1.0,
        "points",
        _POSITION,
    ),
    Claim(
        "C10b",
        "Random position shifting and context perturbation win part of that loss back.",
        "F1 at the last copy with the cure minus F1 with the same batch twice",
        "greater",
        1.0,
        "points",
        _POSITION,
    ),
    Claim(
        "O1",
        "Does adaptive α help under other data sets and other sizes of teacher and student?",
        "published adaptive α minus fixed α of one half, over data sets and sizes",
        "report",
        0.01,
        _BPB,
        _QUESTION,
    ),
    Claim(
        "O3",
        "Is there a better way to alternate between the losses?",
        "best schedule of alternation minus combined loss",
        "report",
        0.01,
        _BPB,
        _QUESTION,
    ),
    Claim(
        "N1",
        "Does the router hold under corrupted input, and under input of no language it knows?",
        "F1 on clean blocks minus F1 on corrupted blocks",
        "report",
        0.1,
        "points",
        _REVIEW,
        needs_seeds=False,
    ),
    Claim(
        "N2",
        "How good is the teacher itself on held-out data?",
        "score of the teacher on test documents",
        "report",
        0.0,
        _BPB,
        _REVIEW,
    ),
    Claim(
        "N3",
        "How much does the mixture of experts keep that sequential training loses?",
        "sequential training minus mixture of experts, after the last stage, mean over languages",
        "report",
        0.02,
        _BPB,
        _REVIEW,
    ),
)

#: The ledger by id, in the order of the study.
CLAIMS: Mapping[str, Claim] = MappingProxyType({claim.id: claim for claim in _LEDGER})


def verdict(claim: Claim, interval: Interval | None) -> Verdict:
    """The verdict on a claim from the interval of its effect; `None` says that its stage was not run.

    Raises:
        MomeError: an interval that is not one (nan, or limits in the wrong order).
    """
    if interval is None:
        nothing = float("nan")
        return Verdict(
            claim.id, "not run", nothing, nothing, nothing, 0, 0, "no result of the notebook that tests it"
        )
    low, high = interval.low, interval.high
    if isnan(interval.estimate) or isnan(low) or isnan(high) or low > high:
        raise MomeError(
            f"The interval for claim {claim.id} is not one ({low} to {high}): check the rows it came from."
        )
    supported, refuted = _sides(claim, low, high)
    outcome: Outcome
    if claim.direction == "report":
        outcome, reason = "measured", "a question, answered by its value"
    elif claim.needs_seeds and interval.seeds < FEWEST_SEEDS:
        outcome = "undecided at this scale"
        reason = f"{interval.seeds} of the {FEWEST_SEEDS} seeds that a verdict needs"
    elif supported:
        outcome, reason = "reproduced", f"the whole interval is {_region(claim, True)}"
    elif refuted:
        outcome, reason = "not reproduced", f"the whole interval is {_region(claim, False)}"
    else:
        outcome, reason = (
            "undecided at this scale",
            f"the interval reaches over the margin of {claim.margin:g}",
        )
    return Verdict(
        claim.id, outcome, interval.estimate, low, high, interval.seeds, interval.documents, reason
    )


def verdict_table(intervals: Mapping[str, Interval | None]) -> pd.DataFrame:
    """Verdicts of several claims as a table, one row per claim in the ledger's order, with their statements.

    Raises:
        MomeError: an id that the ledger does not hold.
    """
    unknown = [name for name in intervals if name not in CLAIMS]
    if unknown:
        raise MomeError(f"The ledger holds no claim {unknown[0]!r}: use one of {', '.join(CLAIMS)}.")
    rows = []
    for claim in CLAIMS.values():
        if claim.id in intervals:
            found = asdict(verdict(claim, intervals[claim.id]))
            rows.append(found | {"statement": claim.statement, "margin": claim.margin, "unit": claim.unit})
    columns = [
        "claim",
        "statement",
        "verdict",
        "estimate",
        "low",
        "high",
        "margin",
        "unit",
        "seeds",
        "documents",
        "reason",
    ]
    return pd.DataFrame(rows, columns=columns)


def _sides(claim: Claim, low: float, high: float) -> tuple[bool, bool]:
    """Whether the interval lies wholly on the claim's side of its margin, and wholly on the other."""
    m = claim.margin
    rules = {
        "at_most": (high < m, low > m),
        "at_least": (low > -m, high < -m),
        "greater": (low > m, high < m),
        "less": (high < -m, low > -m),
        "equal": (-m < low and high < m, low > m or high < -m),
        "report": (False, False),
    }
    return rules[claim.direction]


def _region(claim: Claim, supporting: bool) -> str:
    """The side of the margin that supports the claim, or the other, in words."""
    m = f"{claim.margin:g}"
    regions = {
        "at_most": (f"below +{m}", f"above +{m}"),
        "at_least": (f"above -{m}", f"below -{m}"),
        "greater": (f"above +{m}", f"below +{m}"),
        "less": (f"below -{m}", f"above -{m}"),
        "equal": (f"within ±{m}", f"beyond ±{m}"),
    }
    return regions[claim.direction][0 if supporting else 1]
