"""Evidence: what is read of result tables, in which form, and that nothing is guessed where a table is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from study_results import LANGUAGES, SEEDS, report, score_rows, small_study, write_results

from mome_utils.claims import CLAIMS
from mome_utils.config import MomeError
from mome_utils.crossed import variance_parts
from mome_utils.evidence import SOURCES, Reported, Sampled, contradictions, evidence_rows, read_evidence, reports
from mome_utils.intervals import Interval, combine, paired_interval

KD = "03_kd_alpha_comparison"
PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "results" / "laptop"


def test_the_effects_of_rows_are_those_of_the_tables(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    evidence = read_evidence(results)
    assert list(evidence) == list(CLAIMS)
    scores = pd.read_parquet(results / KD / "scores.parquet")
    fixed, alternating = (scores[scores["arm"] == arm] for arm in ("fixed", "alternating"))
    found = evidence["C2a"]
    assert isinstance(found, Sampled)
    assert found.at().estimate == pytest.approx(paired_interval(fixed, alternating).estimate, abs=1e-12)
    assert found.at().estimate == pytest.approx(-0.5, abs=0.01)
    assert (found.at().seeds, found.at().documents) == (SEEDS, 12)
    forgotten = evidence["C6"]
    assert forgotten is not None and forgotten.at().estimate == pytest.approx(1.0, abs=0.01)
    reported = evidence["C3a"]
    assert isinstance(reported, Reported) and reported.at() == Interval(0.02, 0.0, 0.04, 3, 40)
    assert {claim for claim, known in evidence.items() if known is None} == set(CLAIMS) - {"C1", "C2a", "C3a", "C6"}


def test_rows_of_evidence_are_long_and_complete(tmp_path: Path) -> None:
    rows = evidence_rows(small_study(tmp_path), "C2a")
    assert rows is not None
    assert list(rows.columns) == ["cell", "seed", "document", "nats", "bytes", "tokens"]
    assert not rows.duplicated(["cell", "seed", "document"]).any()
    assert len(rows) == 2 * len(LANGUAGES) * SEEDS * 12
    with pytest.raises(MomeError, match="No rows of documents are kept for claim 'C3a'"):
        evidence_rows(tmp_path, "C3a")


@pytest.mark.parametrize("gone", ["scores", "claims"])
def test_without_its_table_a_claim_has_no_evidence(gone: str, tmp_path: Path) -> None:
    results = small_study(tmp_path)
    (results / KD / f"{gone}.parquet").unlink()
    evidence = read_evidence(results)
    assert evidence["C1"] is None and evidence["C2a"] is None
    assert evidence["C6"] is not None


def test_what_a_notebook_left_open_is_not_read_from_its_rows(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    table = report(("C1", np.nan, np.nan, np.nan), ("C2a", -0.5, -0.6, -0.4))
    write_results(results, {f"{KD}/claims": table})
    evidence = read_evidence(results)
    assert evidence["C1"] is None and evidence["C2a"] is not None


def test_tables_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    write_results(results, {f"{KD}/scores": score_rows(0.0, arm="fixed")})
    with pytest.raises(MomeError, match=f"{KD}/scores.parquet has no rows for arm adaptive"):
        read_evidence(results)
    write_results(results, {f"{KD}/scores": score_rows(0.0)})
    with pytest.raises(MomeError, match="has no column 'arm'"):
        read_evidence(results)
    write_results(results, {f"{KD}/claims": report(("C99", 0, 0, 0))})
    with pytest.raises(MomeError, match="names a claim that the ledger does not hold"):
        reports(results)
    write_results(results, {f"{KD}/claims": report(("C1", 0, 0, 0)).drop(columns="low")})
    with pytest.raises(MomeError, match=r"lacks the columns \['low'\]"):
        reports(results)


def test_a_report_that_is_not_that_of_its_rows_is_found(tmp_path: Path) -> None:
    results = small_study(tmp_path)
    said = {claim: known.at().estimate for claim, known in read_evidence(results).items() if known is not None}
    write_results(results, {f"{KD}/claims": report(("C1", said["C1"], -1, 1), ("C2a", said["C2a"] + 0.001, -1, 1))})
    assert [sentence.split(":")[0] for sentence in contradictions(results, read_evidence(results))] == ["C2a"]


def test_the_published_reports_are_those_of_the_published_rows() -> None:
    evidence = read_evidence(PUBLISHED)
    assert contradictions(PUBLISHED, evidence) == []
    assert {claim for claim in SOURCES if isinstance(evidence[claim], Sampled)} == set(SOURCES)


def test_a_reported_interval_widens_as_students_t_of_its_freedom() -> None:
    known = Reported(Interval(1.0, 0.9, 1.3, 3, 40), 2.0)
    wide = known.at(0.99)
    ratio = stats.t.ppf(0.995, 2) / stats.t.ppf(0.975, 2)
    assert (wide.low, wide.high) == (pytest.approx(1 - 0.1 * ratio), pytest.approx(1 + 0.3 * ratio))
    assert known.at(0.95) == known.interval


# --- the interval itself


def test_one_source_of_chance_gives_its_own_exact_interval() -> None:
    point = np.array([0.1, 0.4, 0.2])
    flat = np.broadcast_to(point, (500, 3))
    exact = stats.t.interval(0.9, 2, point.mean(), stats.sem(point))
    found = combine(point, flat, documents=40, level=0.9)
    assert (found.low, found.high) == (pytest.approx(exact[0]), pytest.approx(exact[1]))
    alone = combine(point, np.empty((0, 3)), documents=0, level=0.9)
    assert (alone.low, alone.high) == (pytest.approx(exact[0]), pytest.approx(exact[1]))
    nothing = combine(np.array([1.0]), np.empty((0, 1)), documents=0)
    assert (nothing.low, nothing.high) == (-np.inf, np.inf)


def test_documents_alone_decide_where_there_is_one_seed() -> None:
    sampled = np.random.default_rng(0).normal(2.0, 0.1, (4000, 1))
    found = combine(np.array([2.0]), sampled, documents=30)
    half = stats.t.ppf(0.975, 29) * sampled.std() * (30 / 29) ** 0.5
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_the_parts_of_the_variance_are_those_of_the_model() -> None:
    """y = S + D + E with standard deviations 1, 2 and 3 over 3 seeds and 50 documents, on average over 300 studies."""
    chance, parts = np.random.default_rng(0), []
    weights = chance.multinomial(50, np.full(50, 1 / 50), size=300) / 50
    for _ in range(300):
        y = chance.normal(size=(3, 1)) + 2 * chance.normal(size=50) + 3 * chance.normal(size=(3, 50))
        parts.append(variance_parts(y.mean(1), weights @ y.T, 50))
    of_seeds, of_documents, of_both = np.mean(parts, axis=0)
    assert of_seeds == pytest.approx(1 / 3 + 9 / 150, rel=0.15)
    assert of_documents == pytest.approx(4 / 50 + 9 / 150, rel=0.15)
    assert of_both == pytest.approx(9 / 150, rel=0.15)
