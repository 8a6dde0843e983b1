"""Tables of agreement: each arm's measures with intervals over seeds and documents, and reliability by bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from mome_utils.agreement import BINS, Agreement
from mome_utils.config import MomeError
from mome_utils.intervals import Interval, IntervalError, crossed_interval

__all__ = ["MEASURES", "SHOWN", "Measure", "agreement_interval", "agreement_table", "reliability"]



@dataclass(frozen=True)
class Measure:
    """A number of :func:`agreement_table`: how its terms are found, and how it is shown.

    A sum of ``column`` over a sum of ``size``; or, where ``relation`` is given, what the bins say: Σ_b |Σ (confidence
    − accuracy)| / positions, the calibration error, or with ``signed`` the same without the bars, overconfidence.
    """

    label: str
    column: str = ""
    size: str = "tokens"
    relation: str = ""
    signed: bool = False
    percent: bool = False


MEASURES: Mapping[str, Measure] = MappingProxyType({
    "same_top": Measure("Same top token (%)", "same_top", percent=True),
    "overlap": Measure("Overlap (%)", "overlap", percent=True),
    "forward_kl": Measure("KL(teacher ‖ student), nats per token", "forward_kl"),
    "forward_kl_per_byte": Measure("KL(teacher ‖ student), nats per byte", "forward_kl", "bytes"),
    "reverse_kl": Measure("KL(student ‖ teacher), nats per token", "reverse_kl"),
    "entropy": Measure("Entropy of the student, nats per token", "student_entropy"),
    "teacher_entropy": Measure("Entropy of the teacher, nats per token", "teacher_entropy"),
    "accuracy": Measure("Top token is right (%)", "student_hits", percent=True),
    "ece": Measure("ECE on the text (%)", relation="student_data", percent=True),
    "ece_teacher": Measure("ECE against the teacher (%)", relation="student_teacher", percent=True),
    "teacher_ece": Measure("ECE of the teacher (%)", relation="teacher_data", percent=True),
    "overconfidence": Measure("Overconfidence on the text (%)", relation="student_data", signed=True, percent=True),
    "overconfidence_teacher": Measure(
        "Overconfidence against the teacher (%)", relation="student_teacher", signed=True, percent=True
    ),
})
"""What can be asked of an agreement. Shares are stored between 0 and 1; only ``text`` shows them as per cent."""

SHOWN = ("same_top", "forward_kl", "reverse_kl", "ece", "ece_teacher")


def agreement_table(
    agreement: Agreement, measures: Sequence[str] = SHOWN, *, by: str = "arm", versus: str | None = None
) -> pd.DataFrame:
    """Each arm's measures with 95 % intervals over seeds and documents (crossed): mean over languages.

    Args:
        agreement: rows with the column ``by`` and, where there are several runs, ``seed``.
        measures: keys of MEASURES.
        by: the column that tells what is compared.
        versus: a value of ``by``: then each row is the difference from it, paired by seed and document.

    Returns:
        Long format: ``by``, measure, label, estimate, low, high, seeds, documents, text.

    Raises:
        MomeError: unknown measures or ``versus``; IntervalError as :func:`agreement_interval`.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise MomeError(f"Unknown measure {unknown[0]!r}: choose from {', '.join(MEASURES)}.")
    names = list(dict.fromkeys(agreement.documents[by]))
    if versus is not None and versus not in names:
        raise MomeError(f"Nothing can be compared with {versus!r}: the rows hold {', '.join(map(str, names))}.")
    part = {name: _of(agreement, by, name) for name in names}
    rows = []
    for name in names:
        if name == versus:
            continue
        for measure in measures:
            found = agreement_interval(part[name], measure, None if versus is None else part[versus])
            label, text = MEASURES[measure].label, _text(found, MEASURES[measure].percent, versus is not None)
            rows.append({by: name, "measure": measure, "label": label} | vars(found) | {"text": text})
    return pd.DataFrame(rows)


def agreement_interval(agreement: Agreement, measure: str, versus: Agreement | None = None) -> Interval:
    """One measure of one arm, or its difference from another arm, with its 95 % interval.

    The same crossed bootstrap as for losses (:mod:`mome_utils.intervals`): a calibration error is put together anew
    in every draw of documents. Its point estimate is that of each seed, averaged. It is biased upwards by noise: even
    a calibrated model has about Σ_b √(2 n_b a_b (1 − a_b) / π) / N in expectation, n_b of N positions and accuracy a_b
    in bin b; over thousands of positions that is small.

    Raises:
        IntervalError: the two share no seed, or rest on different documents.
    """
    rows = _terms(agreement, measure)
    if versus is not None:
        other = _terms(versus, measure)
        both = sorted(set(rows["seed"]) & set(other["seed"]))
        if not both:
            raise IntervalError(
                "The two arms share no seed, so they cannot be paired: train both with the same seeds."
            )
        if set(rows["document"] + " " + rows["language"]) != set(other["document"] + " " + other["language"]):
            raise IntervalError("The two arms were compared on different documents: use the same split for both.")
        rows = pd.concat([rows, other.assign(side=1)], ignore_index=True)
        rows = rows[rows["seed"].isin(both)]
    sides, languages = rows["side"].nunique(), rows["language"].nunique()
    absolute = bool(MEASURES[measure].relation) and not MEASURES[measure].signed

    def statistic(values: np.ndarray) -> np.ndarray:
        cells = values.reshape(*values.shape[:-1], sides, languages, -1)
        found = (np.abs(cells) if absolute else cells).sum(-1).mean(-1)
        return np.asarray(found[..., 0] - found[..., 1] if sides == 2 else found[..., 0])

    return crossed_interval(rows, ["side", "language", "bin"], statistic, measure="nats_per_token")


def reliability(agreement: Agreement, by: Sequence[str] = ("arm",)) -> pd.DataFrame:
    """What a reliability diagram shows: per relation and bin the mean confidence and accuracy, all rows pooled.

    Returns:
        ``by``, relation, bin, low, high (its edges), positions, share (of all positions), confidence, accuracy (nan
        where a bin is empty).
    """
    keys = [*by, "relation", "bin"]
    table = agreement.bins.groupby(keys, sort=False, as_index=False)[["positions", "confidence", "accuracy"]].sum()
    full = table["positions"].where(table["positions"] > 0)
    whole = table.groupby([*by, "relation"])["positions"].transform("sum")
    return table.assign(
        low=table["bin"] / BINS, high=(table["bin"] + 1) / BINS, share=table["positions"] / whole,
        confidence=table["confidence"] / full, accuracy=table["accuracy"] / full,
    )[[*keys, "low", "high", "positions", "share", "confidence", "accuracy"]]


def _of(agreement: Agreement, by: str, name: object) -> Agreement:
    return Agreement(*(rows[rows[by] == name] for rows in (agreement.documents, agreement.bins)))


def _terms(agreement: Agreement, measure: str) -> pd.DataFrame:
    """A measure's rows as :func:`mome_utils.intervals.crossed_interval` wants them: its terms as ``nats``."""
    chosen = MEASURES[measure]
    if chosen.relation:
        rows = agreement.bins[agreement.bins["relation"] == chosen.relation]
        keys = [column for column in ("seed", "language", "document") if column in rows.columns]
        size = rows.groupby(keys)["positions"].transform("sum")
        terms, where = rows["confidence"] - rows["accuracy"], rows["bin"]
    else:
        rows = agreement.documents
        size, terms, where = rows[chosen.size], rows[chosen.column], 0
    seed = rows["seed"] if "seed" in rows.columns else 0
    table = rows[["language", "document"]].assign(
        seed=seed, bin=where, side=0, nats=terms, tokens=size, bytes=size
    )
    return table


def _text(found: Interval, percent: bool, signed: bool) -> str:
    """An interval as a cell of a table."""
    scale, sign, digits = (100 if percent else 1), ("+" if signed else ""), (2 if percent else 4)
    middle, low, high = (format(scale * x, f"{sign}.{digits}f") for x in (found.estimate, found.low, found.high))
    return f"{middle} [{low}, {high}]"
