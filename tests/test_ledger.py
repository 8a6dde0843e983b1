"""The ledger: Holm's verdicts, what a missing stage does, the size of effect that could be seen, and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from study_results import small_study

from mome_utils.claims import CLAIMS, verdict
from mome_utils.evidence import Reported, Sampled
from mome_utils.intervals import Interval
from mome_utils.ledger import (
    ALPHA,
    FIGURES,
    TESTED,
    detectable,
    holm,
    ledger,
    ledger_table,
    paragraph,
    scale_table,
    student,
)
from mome_utils.report import known_ledgers, ledger_csv

ROOT = Path(__file__).resolve().parent.parent
OPEN = "undecided at this scale"


def at_distance(claim: str, errors: float) -> Reported:
    """Evidence that supports a claim, so many standard errors beyond its margin (normal, error 0.001)."""
    rule = CLAIMS[claim]
    side = {"at_most": (1, -1), "at_least": (-1, 1), "greater": (1, 1), "less": (-1, -1), "equal": (1, -1)}
    margin, towards = side[rule.direction]
    middle = margin * rule.margin + towards * errors * 0.001
    return Reported(Interval(middle, middle - 1.959964e-3, middle + 1.959964e-3, 3, 40), 1e9)


def p_value(errors: float) -> float:
    return float(2 * stats.norm.sf(errors))


def test_verdicts_are_holms() -> None:
    """Against the textbook procedure on p-values, for evidence of many strengths."""
    chance = np.random.default_rng(0)
    for _ in range(20):
        errors = dict(zip(TESTED, chance.uniform(0, 4.5, len(TESTED)), strict=True))
        evidence = {claim: at_distance(claim, z) for claim, z in errors.items()}
        p = {claim: p_value(z) for claim, z in errors.items()}
        rejected: set[str] = set()
        for place, claim in enumerate(sorted(p, key=p.__getitem__)):
            if p[claim] > ALPHA / (len(p) - place):
                break
            rejected.add(claim)
        found = {claim for claim, (outcome, _) in holm(evidence).items() if outcome == "reproduced"}
        assert found == rejected


def test_a_claim_that_decides_alone_says_that_the_others_keep_it_open() -> None:
    found = holm({"C1": at_distance("C1", 2.5)})
    assert found["C1"] == (OPEN, f"its own interval decides (reproduced), but not as one of {len(TESTED)} claims")
    assert found["C4"] == ("not run", "no result of the notebook that tests it")
    assert holm({"C1": at_distance("C1", 3.0)})["C1"][0] == "reproduced"


def test_a_missing_stage_makes_no_other_verdict_easier() -> None:
    """The family counts every claim, run or not: leaving evidence out can only open a verdict."""
    chance = np.random.default_rng(1)
    everything = {claim: at_distance(claim, z) for claim, z in zip(TESTED, chance.uniform(1, 4, 13), strict=True)}
    whole = holm(everything)
    for gone in TESTED:
        part = holm({claim: known for claim, known in everything.items() if claim != gone})
        assert part[gone][0] == "not run"
        for claim in set(TESTED) - {gone}:
            assert part[claim][0] in (whole[claim][0], OPEN)


def test_the_ledger_reads_a_run_and_says_not_run_where_its_tables_are_gone(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    entries = ledger(results)
    assert list(entries) == list(CLAIMS)
    ran = {claim: entry.verdict for claim, entry in entries.items() if entry.verdict != "not run"}
    assert ran == {"C1": "reproduced", "C2a": "reproduced", "C3a": "reproduced", "C6": "reproduced"}
    one = entries["C2a"]
    assert one.low_all < one.low < one.estimate < one.high < one.high_all < CLAIMS["C2a"].margin
    for path in (results / "03_kd_alpha_comparison").iterdir():
        path.unlink()
    after = ledger(results)
    assert {claim for claim in entries if entries[claim].verdict != after[claim].verdict} == {"C1", "C2a"}
    assert after["C1"].verdict == after["C2a"].verdict == "not run" and np.isnan(after["C1"].estimate)
    empty = ledger(tmp_path / "nothing")
    assert {entry.verdict for entry in empty.values()} == {"not run"}


def test_every_figure_of_the_ledger_is_there() -> None:
    assert set(FIGURES) == set(CLAIMS)
    for notebook, figure in FIGURES.values():
        if figure and (ROOT / "figures" / notebook).is_dir():
            assert (ROOT / "figures" / notebook / f"{figure}.svg").is_file(), (notebook, figure)


def test_error_and_freedom_are_those_the_intervals_were_made_with() -> None:
    for freedom in (2.0, 7.5, 120.0):
        half = 0.3 * stats.t.ppf(0.975, freedom)
        found = student(Reported(Interval(1.0, 1 - half, 1 + half, 3, 40), freedom))
        assert found == (pytest.approx(0.3), pytest.approx(freedom, rel=1e-4))
    assert student(Reported(Interval(1.0, 1.0, 1.0, 3, 40), 2.0))[0] == 0
    assert detectable(Reported(Interval(1.0, -np.inf, np.inf, 1, 1), 1.0)) == np.inf


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five() -> None:
    """Simulated t intervals of three seeds, against the noncentral t that the function inverts."""
    chance, claim, found = np.random.default_rng(0), CLAIMS["C6"], 0
    half = 0.02 / np.sqrt(3) * stats.t.ppf(0.975, 2)
    beyond = detectable(Reported(Interval(0.0, -half, half, 3, 0), 2.0))
    for values in chance.normal(claim.margin + beyond, 0.02, (2000, 3)):
        found += verdict(claim, Sampled(values, np.empty((0, 3)), 0).at()).verdict == "reproduced"
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_tables_hold_claims_and_findings(tmp_path: Path) -> None:
    table = ledger_table(ledger(small_study(tmp_path)))
    assert list(table["claim"]) == list(CLAIMS)
    assert {"statement", "source", "comparison", "direction", "margin", "unit", "estimate", "low", "high", "low_all",
            "high_all", "verdict", "alone", "reason", "detectable", "notebook", "figure"} <= set(table.columns)
    scales = scale_table({"smoke": table, "laptop": table})
    assert list(scales["claim"][:4]) == ["C1", "C1", "C2a", "C2a"]
    assert list(scales["scale"][:2]) == ["smoke", "laptop"]


def test_a_paragraph_is_made_of_the_numbers(tmp_path: Path) -> None:
    entries = ledger(small_study(tmp_path))
    said = paragraph(entries["C3a"])
    assert "**+0.0200** points, 95 % interval +0.0000 to +0.0400" in said
    assert "3 seeds and 40 documents" in said and "above -0.1: **reproduced**" in said
    assert f"an effect {entries['C3a'].detectable:.2g} beyond the margin" in said
    assert "[notebook 04](04_router_bakeoff.ipynb) (figure `quality_cost`)" in said
    assert "[notebook 07](07_representation_similarity.ipynb) has left no result" in paragraph(entries["C9"])
    assert "no chance in it" in paragraph(replace(entries["C3a"], detectable=0.0))
    assert "With 1 seed these runs could have decided nothing" in paragraph(
        replace(entries["C1"], detectable=np.inf, seeds=1))


def test_too_few_seeds_can_decide_nothing(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    path = results / "03_kd_alpha_comparison" / "scores.parquet"
    rows = pd.read_parquet(path)
    rows[rows["seed"] < 2].to_parquet(path, index=False)
    entries = ledger(results)
    assert entries["C1"].verdict == OPEN and entries["C1"].seeds == 2 and np.isinf(entries["C1"].detectable)
    assert np.isfinite(entries["C3a"].detectable) and np.isfinite(entries["C6"].detectable)


def test_ledgers_of_other_scales_are_those_kept_with_the_repository(tmp_path: Path) -> None:
    entries = ledger(small_study(tmp_path / "results"))
    for name in ("results/laptop/claims.csv", "benchmarks/claims_gpu.csv", "benchmarks/claims_smoke.csv"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ledger_csv(entries), encoding="utf-8")
    own = ledger_table(entries)
    assert list(known_ledgers(tmp_path, "laptop", own)) == ["smoke", "laptop", "gpu"]
    assert known_ledgers(tmp_path, "smoke", own)["smoke"] is own
    assert list(known_ledgers(tmp_path / "nothing", "smoke", own)) == ["smoke"]
    kept = known_ledgers(tmp_path, "smoke", own)["gpu"]
    assert kept.loc[3, "verdict"] == "reproduced" and kept.loc[3, "high"] == pytest.approx(0.04)
