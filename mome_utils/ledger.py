"""The ledger: every claim with its evidence, a verdict that knows how many claims there are, and its power.

A claim is tested by whether its interval lies wholly on one side of its margin (:mod:`mome_utils.claims`). One
95 % interval does that wrongly once in twenty at most; of the ledger's many, one would easily err. So the verdicts
here are Holm's (1979, Scand. J. Statist. 6): the claim that is decided most clearly has to be decided at level
1 − α/m, the next at 1 − α/(m − 1), and so on, with m the number of claims that can be decided *at all*, run or not.
Holm's procedure holds for any dependence between the tests, which is needed here because claims share runs and
documents, and decides whatever Bonferroni does and more. The probability that the ledger holds any wrong verdict is
at most α. Its thin intervals are Bonferroni's, 1 − α/m, all of which hold at once.

Questions without a rule (``report``) are measured, not tested, and do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import optimize, stats

from mome_utils.claims import CLAIMS, FEWEST_SEEDS, Claim, Outcome, verdict
from mome_utils.evidence import LEVEL, Evidence, read_evidence, settled_in
from mome_utils.intervals import Interval

__all__ = ["ALPHA", "FIGURES", "TESTED", "Entry", "detectable", "holm", "ledger", "ledger_table", "paragraph",
           "region", "scale_table", "student"]

ALPHA = 1 - LEVEL
#: The claims that can be decided: the family of Holm's procedure.
TESTED = tuple(claim.id for claim in CLAIMS.values() if claim.direction != "report")
DECIDED = ("reproduced", "not reproduced")
#: How often an effect of the detectable size is found.
POWER = 0.8

#: Claim to the notebook that tests it and the figure there that shows it (none where a table does).
FIGURES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "C1": ("03_kd_alpha_comparison", "effects"), "C2a": ("03_kd_alpha_comparison", "effects"),
    "C2b": ("03_kd_alpha_comparison", ""),
    "C3a": ("04_router_bakeoff", "quality_cost"), "C3b": ("04_router_bakeoff", "quality_cost"),
    "C4": ("05_moe_variants", "effects"), "C5a": ("05_moe_variants", "effects"), "C5b": ("05_moe_variants", "effects"),
    "C6": ("06_forgetting_curves", "forgetting"), "C7": ("06_forgetting_curves", "curves"),
    "C8": ("06_forgetting_curves", "forgetting"),
    "C9": ("07_representation_similarity", "kinds"),
    "C10a": ("08_position_bias", "f1_by_place"), "C10b": ("08_position_bias", "cures"),
    "O1": ("03_kd_alpha_comparison", "adaptive_elsewhere"), "O3": ("03_kd_alpha_comparison", "effects"),
    "N1": ("04_router_bakeoff", "damage"), "N2": ("02_teacher_training", "held_out"),
    "N3": ("06_forgetting_curves", "final"),
})  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the ledger, with its numbers in the claim's unit; nan where nothing was run.

    Attributes:
        claim: its id.
        verdict: Holm's.
        reason: why, in words.
        alone: the verdict of the 95 % interval by itself, without regard to the other claims.
        estimate, low, high: the effect and its 95 % interval.
        low_all, high_all: the limits that hold for all claims of the ledger at once.
        seeds, documents: what the effect was measured on.
        detectable: how far beyond its margin an effect must lie to be decided four times in five, by the 95 %
            interval by itself; infinite where there are too few seeds for any verdict.
        notebook, figure: where it was measured, and the figure that shows it.
    """

    claim: str
    verdict: Outcome
    reason: str
    alone: Outcome
    estimate: float
    low: float
    high: float
    low_all: float
    high_all: float
    seeds: int
    documents: int
    detectable: float
    notebook: str
    figure: str


def ledger(results: Path, evidence: Mapping[str, Evidence | None] | None = None) -> dict[str, Entry]:
    """The ledger of the run whose result tables lie in ``results``, in the order of the claims.

    ``evidence`` is what :func:`mome_utils.evidence.read_evidence` finds there, when it has been read already.
    """
    evidence, settled = read_evidence(results) if evidence is None else evidence, settled_in(results)
    verdicts = holm(evidence)
    entries = {}
    for claim in CLAIMS.values():
        known = evidence[claim.id]
        one, every = (None, None) if known is None else (known.at(), known.at(1 - ALPHA / len(TESTED)))
        alone = verdict(claim, one)
        outcome, reason = verdicts.get(claim.id, (alone.verdict, alone.reason))
        notebook, figure = FIGURES[claim.id]
        notebook = settled.get(claim.id, notebook)
        entries[claim.id] = Entry(
            claim=claim.id, verdict=outcome, reason=reason, alone=alone.verdict,
            estimate=alone.estimate, low=alone.low, high=alone.high,
            low_all=every.low if every else nan, high_all=every.high if every else nan,
            seeds=alone.seeds, documents=alone.documents,
            detectable=nan if known is None else inf if _too_few(claim, alone.seeds) else detectable(known),
            notebook=notebook,
            figure=figure if notebook == FIGURES[claim.id][0] else "",
        )
    return entries


def _too_few(claim: Claim, seeds: int) -> bool:
    """Whether a claim about trainings was tried with fewer seeds than any verdict needs."""
    return claim.needs_seeds and seeds < FEWEST_SEEDS


def holm(evidence: Mapping[str, Evidence | None], alpha: float = ALPHA) -> dict[str, tuple[Outcome, str]]:
    """Verdicts with reasons on the claims of :data:`TESTED`, right together with probability 1 − ``alpha``.

    Args:
        evidence: by claim; a claim without any (or left out) is ``not run`` and counts in the family all the same, so
            that no verdict changes its rule because another stage is missing.
        alpha: probability that any verdict is wrong.
    """
    family = {name: evidence.get(name) for name in TESTED}
    strength = {name: _strength(CLAIMS[name], known, alpha) for name, known in family.items()}
    found: dict[str, tuple[Outcome, str]] = {}
    going = True
    # The strength is the largest k at which 1 - alpha/k still decides; Python's sort keeps ties in ledger order.
    for place, name in enumerate(sorted(strength, key=lambda name: -strength[name])):
        claim, known, left = CLAIMS[name], family[name], len(TESTED) - place
        going = going and strength[name] >= left
        alone = verdict(claim, None if known is None else known.at(1 - alpha))
        if going or alone.verdict not in DECIDED:
            found[name] = (alone.verdict, alone.reason)
        else:
            found[name] = ("undecided at this scale",
                           f"its own interval decides ({alone.verdict}), but not as one of {len(TESTED)} claims")
    return {name: found[name] for name in TESTED}


def _strength(claim: Claim, known: Evidence | None, alpha: float) -> int:
    """The largest k up to the family's size for which the interval of level 1 - alpha/k decides the claim."""
    strength = 0
    for k in range(1, len(TESTED) + 1):
        if known is None or verdict(claim, known.at(1 - alpha / k)).verdict not in DECIDED:
            break
        strength = k
    return strength


def student(evidence: Evidence) -> tuple[float, float]:
    """Standard error and degrees of freedom of the Student's t whose intervals are those of an effect.

    Found from the half-widths at two levels; exact where one source of chance dominates. An effect without spread has
    the error 0; one of a single seed and document the error infinity.
    """
    wide, narrow = (_half(evidence.at(level)) for level in (0.99, 0.5))
    if not isfinite(wide) or wide == 0:
        return (wide, 1.0)
    levels = (1 + np.array([0.99, 0.5])) / 2

    def excess(log_freedom: float) -> float:
        top, bottom = stats.t.ppf(levels, np.exp(log_freedom))
        return float(top / bottom - wide / narrow)

    lowest, highest = np.log(1.0), np.log(1e6)  # the ratio falls as the freedom grows
    if excess(lowest) <= 0 or excess(highest) >= 0:
        freedom = 1.0 if excess(lowest) <= 0 else 1e6
    else:
        freedom = float(np.exp(optimize.brentq(excess, lowest, highest, xtol=1e-10)))
    return float(narrow / stats.t.ppf(levels[1], freedom)), freedom


def detectable(evidence: Evidence, level: float = LEVEL, power: float = POWER) -> float:
    """How far from its margin a true effect must lie for the interval to clear the margin with ``power``.

    The distance d at which a noncentral t with the effect's freedom and noncentrality d / error exceeds the
    interval's quantile with probability ``power``; in the claim's unit, infinite where nothing shows the spread.
    """
    error, freedom = student(evidence)
    if error == 0 or not isfinite(error):
        return 0.0 if error == 0 else inf
    quantile = float(stats.t.ppf((1 + level) / 2, freedom))
    return error * _noncentrality(quantile, freedom, power)


def _noncentrality(quantile: float, freedom: float, power: float) -> float:
    """The noncentrality with which Student's t exceeds ``quantile`` with probability ``power``.

    By the definition t = (z + c) / sqrt(w / f), integrated over w ~ chi²(f): steady where series for the tails of
    the noncentral t are not.
    """
    w = stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom)
    scale = np.sqrt(w / freedom)

    def excess(c: float) -> float:
        return float(stats.norm.sf(quantile * scale - c).mean()) - power

    return float(optimize.brentq(excess, 0.0, 10.0 * quantile + 10.0, xtol=1e-8))


def ledger_table(entries: Mapping[str, Entry]) -> pd.DataFrame:
    """The ledger as a table, one row per claim: what was claimed, how it was tested, and what was found."""
    rows = []
    for entry in entries.values():
        claim = CLAIMS[entry.claim]
        found = asdict(entry)
        rows.append({"claim": claim.id, "statement": claim.statement, "source": claim.source,
                     "comparison": claim.comparison, "direction": claim.direction, "margin": claim.margin,
                     "unit": claim.unit, **{name: value for name, value in found.items() if name != "claim"}})
    return pd.DataFrame(rows)


def region(claim: Claim) -> str:
    """Where the whole interval must lie for the claim to be reproduced, in words; for a question, that it has none."""
    m = f"{claim.margin:g}"
    words = {"at_most": f"below +{m}", "at_least": f"above -{m}", "greater": f"above +{m}", "less": f"below -{m}",
             "equal": f"within ±{m}", "report": "no rule: its value is the answer"}
    return words[claim.direction]


def paragraph(entry: Entry) -> str:
    """What there is to say of a claim, made of its numbers, as Markdown."""
    claim = CLAIMS[entry.claim]
    head = f"**{claim.id}. {claim.statement}** ({claim.source}.)"
    where = f"[notebook {entry.notebook[:2]}]({entry.notebook}.ipynb)"
    if entry.verdict == "not run":
        return f"{head} Not run: {where} has left no result on it."
    shown = f"{where} (figure `{entry.figure}`)" if entry.figure else where
    on = [f"{count} {name}{'s' if count != 1 else ''}" for name, count in
          (("seed", entry.seeds), ("document", entry.documents)) if count > 1 or name == "seed"]
    said = (f"Measured in {shown} on {' and '.join(on)}: {claim.comparison}, **{entry.estimate:+.4f}** {claim.unit}, "
            f"95 % interval {_limits(entry.low, entry.high)}")
    if claim.direction == "report":
        return f"{head} {said}."
    said += f", together with all other claims {_limits(entry.low_all, entry.high_all)}."
    power = f"These runs would find an effect {entry.detectable:.2g} beyond the margin four times in five."
    if entry.detectable == 0:
        power = "All seeds and documents show the very same effect, so there is no chance in it to judge by."
    elif not isfinite(entry.detectable):
        power = f"With {on[0]} these runs could have decided nothing, however large the effect."
    alone = f" (Its interval by itself says: {entry.alone}.)" if entry.alone != entry.verdict else ""
    rule = f"The claim holds if the effect is {region(claim)}"
    return f"{head} {said} {rule}; {entry.reason}: **{entry.verdict}**.{alone} {power}"


def _limits(low: float, high: float) -> str:
    return f"{low:+.4f} to {high:+.4f}" if isfinite(low) and isfinite(high) else "without limits"


def scale_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Effect, limits and verdict of every claim at several scales, one row per claim and scale.

    Args:
        tables: name of the scale to its :func:`ledger_table`, in the order to show.
    """
    columns = ["claim", "estimate", "low", "high", "margin", "unit", "seeds", "documents", "verdict"]
    rows = pd.concat([table[columns].assign(scale=name) for name, table in tables.items()], ignore_index=True)
    order = {claim: place for place, claim in enumerate(CLAIMS)}
    return rows.sort_values("claim", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2
