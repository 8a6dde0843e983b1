"""The evidence on each claim, read from the result tables that the notebooks leave.

A run's results are folders ``<results>/<notebook>/<table>.parquet`` (``data/results/laptop`` for the published run,
``data/artifacts/<profile>/results`` for any other). Two kinds of table hold evidence.

**Rows** are long: one row for each seed, document and cell of the comparison, and what was measured there.

==================  ==========================================================================================
``cell``            place in the comparison, from 0: the languages of the first side, then those of the second;
                    or the places of the matrix R[stage, language], row by row
``seed``            the seed of the training
``document``        the test document; translations of one article share it, so they are resampled together
``nats, bytes,      the loss of the document (nats), and its length in bytes and in tokens
tokens``
==================  ==========================================================================================

:func:`evidence_rows` brings a notebook's table of scores into this form; :class:`Sampled` resamples it.

**Reports** are the rows of ``claims.parquet``, which every notebook writes with ``study.settle``: ``claim, estimate,
low, high, seeds, documents``. They are the evidence where the rows themselves are not kept (:class:`Reported`).

What a notebook left open, and what lost its table, is no evidence: :func:`read_evidence` then holds ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import stats

from mome_utils import forgetting
from mome_utils.claims import CLAIMS, Claim
from mome_utils.config import MomeError
from mome_utils.intervals import DRAWS, Interval, Statistic, combine, cube, mean_of_cells, resample

__all__ = ["SOURCES", "Evidence", "Reported", "Sampled", "Source", "contradictions", "evidence_rows",
           "read_evidence", "reports", "settled_in"]

#: The level that notebooks and README show.
LEVEL = 0.95
ROW_COLUMNS = ("cell", "seed", "document", "nats", "bytes", "tokens")
REPORT_COLUMNS = ("claim", "estimate", "low", "high", "seeds", "documents")


class Evidence(Protocol):
    """What is known of an effect: its interval at any level."""

    def at(self, level: float = LEVEL) -> Interval:
        """The confidence interval at ``level``."""
        ...


@dataclass(frozen=True)
class Sampled:
    """An effect with its resamples.

    Attributes:
        point: the effect of each seed, [seeds].
        sampled: the effect of each seed when documents are drawn anew, [draws, seeds].
        documents: how many were drawn from; 0 for values measured once per run.
    """

    point: np.ndarray
    sampled: np.ndarray
    documents: int

    def at(self, level: float = LEVEL) -> Interval:
        """The interval over seeds and documents, crossed (:func:`mome_utils.intervals.combine`)."""
        return combine(self.point, self.sampled, documents=self.documents, level=level)


@dataclass(frozen=True)
class Reported:
    """An effect known by its 95 % interval alone.

    Other levels scale its two sides as Student's t with ``freedom`` does. The smaller the freedom, the wider they
    become, so the smallest that the design allows is assumed: one less than the seeds, or, where trainings do not
    matter, than the documents.
    """

    interval: Interval
    freedom: float

    def at(self, level: float = LEVEL) -> Interval:
        """The interval, scaled from 95 % to ``level``."""
        upper, known = stats.t.ppf([(1 + level) / 2, (1 + LEVEL) / 2], self.freedom)
        middle, ratio = self.interval.estimate, float(upper / known)
        low, high = (middle + ratio * (limit - middle) for limit in (self.interval.low, self.interval.high))
        return Interval(middle, low, high, self.interval.seeds, self.interval.documents)


@dataclass(frozen=True)
class Source:
    """Where the rows of a claim's comparison lie, and how an effect is made of them.

    Attributes:
        notebook, table: ``<results>/<notebook>/<table>.parquet``.
        sides: which rows, by the values of columns: one selection, or two whose difference is the effect. The value
            ``"last"`` means the largest of a column.
        matrix: of one selection, the metric of R[stage, language] that is the effect; languages count in the
            order in which the table names them, that of the course.
        curve: of one selection of validation curves, the metric of R[point, language], one value per seed.
    """

    notebook: str
    table: str
    sides: tuple[Mapping[str, Any], ...]
    matrix: Statistic | None = field(default=None, repr=False)
    curve: Statistic | None = field(default=None, repr=False)


_KD, _MOE, _COURSE = "03_kd_alpha_comparison", "05_moe_variants", "06_forgetting_curves"


def _arms(notebook: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Source:
    return Source(notebook, "scores", (first, second))


#: Claims whose rows are kept. The others are judged by what their notebook reports.
SOURCES: Mapping[str, Source] = MappingProxyType({
    "C1": _arms(_KD, {"arm": "adaptive"}, {"arm": "fixed"}),
    "C2a": _arms(_KD, {"arm": "fixed"}, {"arm": "alternating"}),
    "C4": _arms(_MOE, {"arm": "ple", "setting": "routed"}, {"arm": "jeet", "setting": "routed"}),
    "C5a": _arms(_MOE, {"arm": "moe_ce", "setting": "routed"}, {"arm": "jeet", "setting": "routed"}),
    "C5b": _arms(_MOE, {"arm": "moe_ce", "setting": "routed, with common"}, {"arm": "moe_ce", "setting": "routed"}),
    "C6": Source(_COURSE, "scores", ({"arm": "sequential"},), matrix=forgetting.first_language_forgetting),
    "C7": Source(_COURSE, "curves", ({"arm": "single_session"},), curve=forgetting.rise_since_best),
    "C8": Source(_COURSE, "scores", ({"arm": "moe"},), matrix=forgetting.forgetting),
    "N2": Source("02_teacher_training", "test_rows", ({"arm": "teacher"},)),
    "N3": _arms(_COURSE, {"arm": "sequential", "stage": "last"}, {"arm": "moe", "stage": "last"}),
})


def reports(results: Path) -> pd.DataFrame:
    """The rows of every notebook's ``claims.parquet`` that hold an effect, with a column ``notebook``.

    A claim that two notebooks settle is taken from the later one.

    Raises:
        MomeError: a table lacks a column, or the ledger does not hold its claim.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*/claims.parquet")):
        table = pd.read_parquet(path)
        missing = set(REPORT_COLUMNS) - set(table.columns)
        if missing or not set(table["claim"]) <= set(CLAIMS):
            what = f"lacks the columns {sorted(missing)}" if missing else "names a claim that the ledger does not hold"
            raise MomeError(f"{path.parent.name}/claims.parquet {what}: run that notebook again.")
        for row in table[list(REPORT_COLUMNS)].to_dict("records"):
            if pd.notna(row["estimate"]):
                found[row["claim"]] = row | {"notebook": path.parent.name}
    rows = [found[claim] for claim in CLAIMS if claim in found]
    return pd.DataFrame(rows, columns=[*REPORT_COLUMNS, "notebook"])


def settled_in(results: Path) -> dict[str, str]:
    """The notebook that settled each claim there is evidence on."""
    table = reports(results)
    return dict(zip(table["claim"], table["notebook"], strict=True))


def read_evidence(results: Path) -> dict[str, Evidence | None]:
    """The evidence on every claim of the ledger; ``None`` where its notebook was not run or its table is gone.

    Args:
        results: the folder of a run's result tables.

    Raises:
        MomeError: a table cannot be what it should be; the sentence names it.
    """
    found: dict[str, Evidence | None] = dict.fromkeys(CLAIMS)
    for row in reports(results).to_dict("records"):
        claim = CLAIMS[row["claim"]]
        source = SOURCES.get(claim.id)
        if source is not None and source.notebook == row["notebook"]:
            found[claim.id] = _sampled(results, source)
        else:
            found[claim.id] = _reported(claim, row)
    return found


def contradictions(results: Path, evidence: Mapping[str, Evidence | None], tolerance: float = 1e-6) -> list[str]:
    """Where the effect that a notebook reports is not that of its own rows, one sentence each.

    Args:
        results: the folder that :func:`read_evidence` read.
        evidence: what it found.
        tolerance: of the comparison, relative and absolute.
    """
    said = reports(results).set_index("claim")
    wrong = []
    for claim, known in evidence.items():
        if isinstance(known, Sampled):
            then = said.loc[claim]
            if not np.isclose(known.at().estimate, then["estimate"], rtol=tolerance, atol=tolerance):
                wrong.append(f"{claim}: {then['notebook']}/claims.parquet and the rows it was made of disagree.")
    return wrong


def evidence_rows(results: Path, claim: str) -> pd.DataFrame | None:
    """The rows of a claim's comparison in the long form of this module, sorted; ``None`` where there are none.

    Raises:
        MomeError: the claim has no rows in this form, or its table lacks some.
    """
    source = SOURCES.get(claim)
    if source is None or source.curve is not None:
        raise MomeError(f"No rows of documents are kept for claim {claim!r}: its notebook reports the effect.")
    table = _table(results, source)
    if table is None:
        return None
    parts = []
    for number, side in enumerate(source.sides):
        part = _select(table, side, source)
        part = part if source.matrix is not None else part.assign(stage=0)
        places = {language: place for place, language in enumerate(pd.unique(part["language"]))}
        if source.matrix is None:  # the order of languages means nothing there: sorted, as the notebooks do
            places = {language: place for place, language in enumerate(sorted(places))}
        parts.append(part.assign(side=number, place=part["language"].map(places)))
    rows = pd.concat(parts, ignore_index=True)
    rows["cell"] = rows.groupby(["side", "stage", "place"], sort=True).ngroup()
    return rows[list(ROW_COLUMNS)].sort_values(["cell", "seed", "document"], ignore_index=True)


def _sampled(results: Path, source: Source) -> Sampled | None:
    """The effect of a comparison whose rows are kept."""
    if source.curve is not None:
        table = _table(results, source)
        return None if table is None else _of_curves(_select(table, source.sides[0], source), source.curve)
    claim = next(name for name, known in SOURCES.items() if known is source)
    rows = evidence_rows(results, claim)
    if rows is None:
        return None
    if len(source.sides) == 2:  # only seeds that both sides have can be paired
        half = (rows["cell"].max() + 1) // 2
        common = set(rows.loc[rows["cell"] < half, "seed"]) & set(rows.loc[rows["cell"] >= half, "seed"])
        rows = rows[rows["seed"].isin(common)]
    losses, sizes = cube(rows, ["cell"])
    statistic = _statistic(source)
    sampled = np.concatenate([statistic(part) for part in resample(losses, sizes, DRAWS)])
    return Sampled(statistic(losses.sum(1) / sizes.sum(1)), sampled, losses.shape[1])


def _statistic(source: Source) -> Statistic:
    """The effect as a function of the cells' scores [..., cells] -> [...]."""
    metric = source.matrix
    if metric is not None:
        def of_matrix(cells: np.ndarray) -> np.ndarray:
            side = round(cells.shape[-1] ** 0.5)
            return np.asarray(metric(cells.reshape(*cells.shape[:-1], side, side)))

        return of_matrix
    return paired_difference if len(source.sides) == 2 else mean_of_cells


def paired_difference(cells: np.ndarray) -> np.ndarray:
    """Mean over the first half of the cells minus mean over the second, [..., cells] -> [...]."""
    half = cells.shape[-1] // 2
    return np.asarray(cells[..., :half].mean(-1) - cells[..., half:].mean(-1))


def _of_curves(rows: pd.DataFrame, metric: Statistic) -> Sampled:
    """One value per seed, of its validation curves as a matrix [point, language]."""
    values = [float(metric(part.pivot(index="step", columns="language", values="value").to_numpy()))
              for _, part in rows.groupby("seed", sort=True)]
    return Sampled(np.array(values), np.empty((0, len(values))), 0)


def _reported(claim: Claim, row: Mapping[str, Any]) -> Reported:
    """The effect that a notebook reports, with the smallest freedom its design allows."""
    estimate, low, high = (float(row[name]) for name in ("estimate", "low", "high"))
    found = Interval(estimate, low, high, int(row["seeds"]), int(row["documents"]))
    units = found.seeds if claim.needs_seeds or found.documents < 2 else found.documents
    return Reported(found, float(max(1, units - 1)))


def _table(results: Path, source: Source) -> pd.DataFrame | None:
    path = results / source.notebook / f"{source.table}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _select(table: pd.DataFrame, side: Mapping[str, Any], source: Source) -> pd.DataFrame:
    """The rows of one side of a comparison."""
    where = f"{source.notebook}/{source.table}.parquet"
    part = table
    for column, wanted in side.items():
        if column not in part.columns:
            raise MomeError(f"{where} has no column '{column}': run that notebook again.")
        part = part[part[column] == (part[column].max() if wanted == "last" else wanted)]
    if part.empty:
        said = ", ".join(f"{column} {value}" for column, value in side.items())
        raise MomeError(f"{where} has no rows for {said}: run that notebook again.")
    return part
