"""How far a student agrees with its teacher, beside the loss: top tokens, divergences, calibration.

Both models read the same windows of the same documents as in :mod:`mome_utils.evaluation`, so every token is
scored once and every row belongs to one document. With p the teacher's and q the student's distribution at a
position, and y the token that follows in the text:

- *same top token*: argmax q = argmax p (of equal values the first);
- *overlap*: Σ_v min(p_v, q_v) = 1 − total variation, the share of the student's samples that speculative decoding
  would accept (Leviathan et al., arXiv 2211.17192, theorem 3.5);
- *forward* and *reverse* Kullback-Leibler divergence, KL(p ‖ q) and KL(q ‖ p), at temperature 1;
- *calibration*: the expected calibration error (Guo et al., arXiv 1706.04599, equation 3) over 15 bins of equal
  width, (0, 1/15], … (14/15, 1]: the mean distance between confidence and accuracy, each bin weighed by its
  positions. Three relations are kept:

  ===================  =====================  ========================================================
  relation             confidence             accuracy
  ===================  =====================  ========================================================
  student_data         max_v q_v              1 where argmax q = y, else 0
  teacher_data         max_v p_v              1 where argmax p = y, else 0
  student_teacher      max_v q_v              p at argmax q: how often that token would be right if the
                                              teacher wrote the text
  ===================  =====================  ========================================================

Rows hold sums, so that any selection of documents can be put together exactly; ``agreement_tables`` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mome_utils.artifacts import DamagedArtifact, digest, source_digest
from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.dataset import StudyData
from mome_utils.divergences import DIVERGENCES, log_probabilities
from mome_utils.evaluation import PositionLogits, position_logits, window_batches
from mome_utils.runs import Run, torch_threads
from mome_utils.sweeps import in_parallel, on_device, quiet
from mome_utils.training import TrainSpec

if TYPE_CHECKING:
    from mome_utils.study import Study

__all__ = ["BINS", "RELATIONS", "Agreement", "agreement_job", "agreement_rows", "compare_documents"]

BINS = 15
RELATIONS = ("student_data", "teacher_data", "student_teacher")
#: Modules whose sources define the rows.
MODULES = tuple(f"mome_utils.{name}" for name in ("agreement", "divergences", "evaluation"))
#: Probabilities (positions times vocabulary) that a processor compares at once.
CHUNK = 1 << 19
SUMS = (
    "same_top", "overlap", "forward_kl", "reverse_kl", "student_nats", "teacher_nats", "student_entropy",
    "teacher_entropy", "student_hits", "teacher_hits",
)


@dataclass(frozen=True)
class Agreement:
    """Sums per document.

    documents: a row per student and document: ``student`` (or ``run``, ``arm``, ``seed``), ``language``,
    ``document``, ``tokens`` (scored positions), ``bytes``, and sums over positions of ``same_top`` and ``overlap``
    (counts), ``forward_kl``, ``reverse_kl``, ``student_nats`` and ``teacher_nats`` (loss on the text),
    ``student_entropy``, ``teacher_entropy`` (all in nats), ``student_hits``, ``teacher_hits`` (top token = text).

    bins: a row per student, document, ``relation`` and ``bin`` (0 to 14), empty ones included: ``positions``, and
    over them the sums of ``confidence`` and ``accuracy``.
    """

    documents: pd.DataFrame
    bins: pd.DataFrame

    def assign(self, **columns: object) -> Agreement:
        """The same sums with constant columns added to both tables."""
        return Agreement(self.documents.assign(**columns), self.bins.assign(**columns))

    @staticmethod
    def concat(parts: Sequence[Agreement]) -> Agreement:
        """Several agreements as one."""
        documents, bins = ([getattr(part, name) for part in parts] for name in ("documents", "bins"))
        return Agreement(pd.concat(documents, ignore_index=True), pd.concat(bins, ignore_index=True))


# ------------------------------------------------------------------------------------------------------- counting


def compare_documents(
    students: Mapping[str, PositionLogits],
    teacher: PositionLogits,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    batch_size: int = 32,
) -> Agreement:
    """Every student beside one teacher, in one pass over the documents: the teacher reads each window once.

    Args:
        students: name → logits at scored positions (:func:`position_logits`).
        block_size, stride: of :func:`mome_utils.evaluation.windows`, in tokens.
        batch_size: windows read at once; the logits of one batch and one model are held at a time, the
            teacher's beside them.

    Returns:
        Rows in the order of students, then documents; column ``student`` is the name.
    """
    if not students:
        raise MomeError("There is no student to compare with the teacher: pass at least one.")
    tokens = np.zeros(len(documents), dtype=np.int64)
    sums = {name: np.zeros((len(documents), len(SUMS))) for name in students}
    bins = {name: np.zeros((3, len(documents), len(RELATIONS), BINS)) for name in students}
    with torch.inference_mode():
        for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
            owners = batch.target_owners.numpy()
            np.add.at(tokens, owners, 1)
            taught = _taught(teacher(batch), batch.targets)
            for name, student in students.items():
                values, confidence, accuracy = _compared(student(batch), taught)
                np.add.at(sums[name], owners, values)
                _count(bins[name], owners, confidence, accuracy)
    sizes = [len(document.text.encode()) for document in documents]
    held = pd.DataFrame({
        "language": [document.language for document in documents],
        "document": [document.id for document in documents],
        "tokens": tokens, "bytes": np.array(sizes, dtype=np.int64),
    })
    parts = [Agreement(held.assign(**dict(zip(SUMS, sums[name].T, strict=True))), _bin_rows(held, bins[name]))
             .assign(student=name) for name in students]
    return Agreement.concat(parts)


@dataclass(frozen=True)
class _Taught:
    """A batch as the teacher sees it: log p [S, V]; and [S]: targets, argmax p, its probability, −log p_y, entropy."""

    log_p: Tensor
    targets: Tensor
    best: Tensor
    top: Tensor
    nats: Tensor
    entropy: Tensor

    def split(self) -> Iterator[_Taught]:
        """The same in pieces of few enough positions that their probabilities stay in a processor's cache."""
        size = max(1, (CHUNK if self.log_p.device.type == "cpu" else 128 * CHUNK) // self.log_p.shape[-1])
        for parts in zip(*(x.split(size) for x in vars(self).values()), strict=True):
            yield _Taught(*parts)


def _taught(logits: Tensor, targets: Tensor) -> _Taught:
    """What does not depend on the student, from the teacher's logits [S, V]."""
    log_p, targets = log_probabilities(logits), targets.to(logits.device)
    best = log_p.argmax(-1)
    top, nats = (log_p.gather(1, at[:, None])[:, 0] for at in (best, targets))
    return _Taught(log_p, targets, best, top.exp(), -nats, _entropy(log_p, log_p.softmax(-1)))


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    """−Σ_v p log p in nats, [S, V] → [S]; a token that is ruled out adds 0."""
    found = -torch.linalg.vecdot(p, log_p)
    if bool(torch.isfinite(found).all()):
        return found
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def _compared(logits: Tensor, taught: _Taught) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums' terms [S, len(SUMS)], and confidence and accuracy [S, 3] of the relations, of a student's logits [S, V]."""
    parts = list(taught.split())
    pieces = logits.split([len(part.targets) for part in parts])
    found = [_positions(piece, part) for piece, part in zip(pieces, parts, strict=True)]
    values, confidence, accuracy = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    return values, confidence, accuracy


def _positions(logits: Tensor, taught: _Taught) -> tuple[Tensor, Tensor, Tensor]:
    """What `_compared` returns, of one piece."""
    log_p, log_q = taught.log_p, log_probabilities(logits)
    p, q, best = log_p.softmax(-1), log_q.softmax(-1), log_q.argmax(-1)  # of log-probabilities, softmax is exp
    at_best, at_target = (log_q.gather(1, at[:, None])[:, 0] for at in (best, taught.targets))
    right, taught_right = best == taught.targets, taught.best == taught.targets
    values = (
        best == taught.best,
        torch.minimum(p, q).sum(-1),
        DIVERGENCES["forward_kl"].compute(log_p, log_q, 0.0),
        DIVERGENCES["reverse_kl"].compute(log_p, log_q, 0.0),
        -at_target, taught.nats, _entropy(log_q, q), taught.entropy, right, taught_right,
    )
    confidence = (at_best.exp(), taught.top, at_best.exp())
    accuracy = (right, taught_right, p.gather(1, best[:, None])[:, 0])
    first, second, third = (torch.stack([x.double() for x in part], 1) for part in (values, confidence, accuracy))
    return first, second, third


def _count(bins: np.ndarray, owners: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> None:
    """Add positions, confidences and accuracies [S, 3] to ``bins`` [3, documents, relations, BINS], in place."""
    # Bin m holds (m/M, (m+1)/M], so that a confidence of one falls into the last.
    places = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    flat = (owners[:, None] * len(RELATIONS) + np.arange(len(RELATIONS))) * BINS + places
    for total, weights in zip(bins, (np.ones_like(confidence), confidence, accuracy), strict=True):
        total += np.bincount(flat.ravel(), weights.ravel(), total.size).reshape(total.shape)


def _bin_rows(held: pd.DataFrame, bins: np.ndarray) -> pd.DataFrame:
    """``bins`` [3, documents, relations, BINS] in long format."""
    repeats = len(RELATIONS) * BINS
    return pd.DataFrame({
        "language": np.repeat(held["language"].to_numpy(), repeats),
        "document": np.repeat(held["document"].to_numpy(), repeats),
        "relation": np.tile(np.repeat(RELATIONS, BINS), len(held)),
        "bin": np.tile(np.arange(BINS), len(held) * len(RELATIONS)),
        "positions": bins[0].ravel().astype(np.int64), "confidence": bins[1].ravel(), "accuracy": bins[2].ravel(),
    })


# ---------------------------------------------------------------------------------------------------- the store


def agreement_job(
    teacher: tuple[TrainSpec, Path], students: Sequence[tuple[TrainSpec, Path]], languages: Sequence[str], split: str,
    stride: int, data_folder: Path,
) -> Agreement:
    """Finished runs beside their teacher on a split's documents; column ``student`` is a run's key."""
    quiet()  # padded windows want no mask, which libraries would ask for: a causal model does not see the padding
    data = StudyData.load(data_folder)
    documents = [d for language in languages for d in data.documents(split, language)]

    def reader(spec: TrainSpec, folder: Path) -> PositionLogits:
        return position_logits(on_device(Run(spec, folder.name, folder).model()))

    with torch_threads(teacher[0].threads):
        return compare_documents(
            {folder.name: reader(spec, folder) for spec, folder in students}, reader(*teacher), data.tokenizer,
            documents, block_size=data.block_size, stride=stride,
        )


def agreement_rows(
    study: Study, arms: Mapping[str, Sequence[Run]], teachers: Sequence[Run], languages: Sequence[str] | None = None,
    *, split: str = "test",
) -> Agreement:
    """Every run of every arm beside its teacher, computed once and kept in the store.

    Args:
        arms: arm → runs. A run without a teacher (cross-entropy alone) is compared with that of its seed.
        teachers: the teachers' runs.
        languages: which documents; by default those of the languages a run was trained on.
        split: ``test`` or ``validation``.

    Returns:
        The rows with the columns ``arm``, ``run`` and ``seed``.

    Raises:
        MomeError: a run's teacher is not among ``teachers``.
    """
    sources = [source_digest(module) for module in MODULES]
    wanted: dict[str, tuple[Run, Run, tuple[str, ...]]] = {}
    keys: list[tuple[str, Run, str]] = []
    for arm, runs in arms.items():
        for run in runs:
            pair = (run, _teacher_of(run, teachers), tuple(languages or run.spec.languages))
            key = _key(study, *pair, split, sources)
            wanted[key] = pair
            keys.append((arm, run, key))
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, (_, teacher, codes) in wanted.items():
        if not _held(study, key):
            groups.setdefault((teacher.key, codes), []).append(key)
    jobs = []
    for (_, codes), members in groups.items():
        teacher = wanted[members[0]][1]
        students = [(wanted[key][0].spec, wanted[key][0].folder) for key in members]
        jobs.append(((teacher.spec, teacher.folder), students, codes, split, study.profile.stride, study.data().path))
    tables = in_parallel(agreement_job, jobs, workers=max(1, min(study.profile.jobs, len(jobs))))
    for members, table in zip(groups.values(), tables, strict=True):
        for key in members:
            _save(study, key, *wanted[key], split, table)
    return Agreement.concat([_read(study, key).assign(arm=arm, run=run.key, seed=run.spec.seed)
                             for arm, run, key in keys])


def _teacher_of(run: Run, teachers: Sequence[Run]) -> Run:
    for teacher in teachers:
        if run.spec.teacher == teacher.key or (run.spec.teacher is None and run.spec.seed == teacher.spec.seed):
            return teacher
    raise MomeError(f"The teacher of a run with seed {run.spec.seed} is not among the teachers given: pass it too.")


def _key(
    study: Study, run: Run, teacher: Run, languages: Sequence[str], split: str, sources: Sequence[str]
) -> str:
    return digest({
        "name": "agreement", "student": run.key, "teacher": teacher.key, "languages": languages, "split": split,
        "data": study.data().fingerprint, "stride": study.profile.stride, "sources": sources,
    })


def _held(study: Study, key: str) -> bool:
    try:
        return study.store.load("scores", key) is not None
    except DamagedArtifact:
        return False  # made again


def _save(
    study: Study, key: str, run: Run, teacher: Run, languages: Sequence[str], split: str, table: Agreement
) -> None:
    parameters = {"run": run.key, "teacher": teacher.key, "languages": languages, "split": split}
    inputs = {"data": study.data().fingerprint}
    with study.store.create("scores", key, inputs=inputs, parameters=parameters, modules=MODULES) as result:
        for name, rows in vars(table).items():
            own = rows[rows["student"] == run.key].drop(columns="student")
            own.to_parquet(result.folder / f"{name}.parquet", index=False)


def _read(study: Study, key: str) -> Agreement:
    folder = study.store.path("scores", key)
    study.touch(folder)
    return Agreement(*(pd.read_parquet(folder / f"{name}.parquet") for name in ("documents", "bins")))
