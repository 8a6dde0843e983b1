"""The tasks of notebook 08: sentences of the study's documents, or of annotated files, with a label for each word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.dataset import StudyData
from mome_utils.models import IGNORED
from mome_utils.tagging import OUTSIDE, Sentence, Tagged, sentences
from mome_utils.tagging_entities import ENTITY_LABELS, tag_entities
from mome_utils.tagging_files import read_folder
from mome_utils.tagging_python import PYTHON_LABELS, tag_python
from mome_utils.token_classes import CLASSES, CODE, byte_classes, function_words

__all__ = [
    "ENTITY_LANGUAGES", "Task", "TaskSpec", "label_positions", "make_task", "sample", "tag_words",
    "task_from_folder", "task_specs",
]

#: Languages whose names can be told by rule.
ENTITY_LANGUAGES = ("en", "fr")
_LABELS = {
    "code": PYTHON_LABELS, "entities": ENTITY_LABELS, "words": tuple(name for name in CLASSES if name != "space"),
}
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TaskSpec:
    """What defines a task on a data set.

    ``kind`` is ``code`` (kinds of tokens of Python), ``entities`` (spans by rule) or ``words`` (kinds of words by rule,
    in any language); ``longest`` the most subwords of a sentence; ``learned`` and ``tested`` how many sentences are
    kept for training and for testing.
    """

    kind: str
    languages: tuple[str, ...]
    longest: int
    learned: int
    tested: int

    def __post_init__(self) -> None:
        if self.kind not in _LABELS:
            raise MomeError(f"There is no task '{self.kind}': choose one of {', '.join(_LABELS)}.")


@dataclass(frozen=True)
class Task:
    """Sentences to learn from and to be tested on.

    Attributes:
        name: what a reader sees.
        labels: names of the labels, in the order of their indices.
        spans: whether labels are BIO, and so scored as spans.
        train, test: sentences.
    """

    name: str
    labels: tuple[str, ...]
    spans: bool
    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]

    def positive(self, label: int) -> bool:
        """Whether a label marks something to be found (any but "outside")."""
        return label != IGNORED and self.labels[label] != OUTSIDE


def task_specs(languages: Sequence[str], block_size: int, copies: int, learned: int, tested: int) -> list[TaskSpec]:
    """The tasks that a study's languages allow: ``code`` with Python, ``entities`` with English or French.

    Where there is neither, ``words``. A sentence with one special token before it fits ``copies`` times into a block.
    """
    groups = {"code": [g for g in languages if g in CODE], "entities": [g for g in languages if g in ENTITY_LANGUAGES]}
    if not any(groups.values()):
        groups = {"words": list(languages)}
    longest = (block_size - 1) // copies
    return [TaskSpec(kind, tuple(own), longest, learned, tested) for kind, own in groups.items() if own]


def make_task(spec: TaskSpec, data: StudyData) -> Task:
    """The sentences of a task, spread evenly over the documents.

    Training on spans takes sentences with a span and as many without one: positives stay rare, but not so rare that a
    small model learns to say nothing. The test sentences are as they come.

    Raises:
        MomeError: no document of the languages can be labelled.
    """
    found: dict[str, list[Sentence]] = {"train": [], "test": []}
    labels = _LABELS[spec.kind]
    for language in spec.languages:
        learned = data.documents("train", language)
        frequent = function_words([d.text for d in learned])
        for split, own in found.items():
            documents = learned if split == "train" else data.documents(split, language)
            tagged = [_tag(spec.kind, d, frequent) for d in documents]
            own += sentences(data.tokenizer, [t for t in tagged if t is not None], labels, spec.longest)
    if not found["train"] or not found["test"]:
        raise MomeError(f"The task '{spec.kind}' finds nothing to label in {', '.join(spec.languages)}: leave it out.")
    spans, train = spec.kind == "entities", sample(found["train"], spec.learned)
    if spans:
        some = [s for s in found["train"] if any(label > 0 for label in s.labels)]
        none = [s for s in found["train"] if all(label <= 0 for label in s.labels)]
        train = (*sample(some, spec.learned // 2), *sample(none, min(len(some), spec.learned // 2)))
    return Task(spec.kind, labels, spans, train, sample(found["test"], spec.tested))


def _tag(kind: str, document: Document, frequent: frozenset[str]) -> Tagged | None:
    if kind == "code":
        return tag_python(document)
    return tag_entities(document, frequent) if kind == "entities" else tag_words(document, frequent)


def tag_words(document: Document, frequent: frozenset[str]) -> Tagged:
    """The words of a text of any language with their kinds (:mod:`mome_utils.token_classes`), breaks after lines."""
    text, code = document.text, document.language in CODE
    kinds = byte_classes(text, frequent, code=code)
    at = np.cumsum([0, *(len(c.encode()) for c in text)])
    words = tuple((m.start(), m.end(), CLASSES[kinds[at[m.start()]]]) for m in _WORD.finditer(text))
    breaks = tuple(m.end() for m in re.finditer(r"\n+", text) if m.end() < len(text))
    return Tagged(document.id, document.language, text, words, breaks)


def task_from_folder(
    folder: Path, data: StudyData, longest: int, *, field: str = "upos", tested: int | None = None
) -> Task:
    """A task from annotated files (:func:`mome_utils.tagging_files.read_folder`); labels in alphabetical order.

    Raises:
        MomeError: files that cannot be used, or a test file with a label that training never showed.
    """
    splits = read_folder(folder, field=field)
    known = {split: {label for t in tagged for _, _, label in t.words} for split, tagged in splits.items()}
    strange = sorted(known["test"] - known["train"])
    if strange:
        raise MomeError(f"The label '{strange[0]}' is in the test file of '{folder.name}' only: add examples of it.")
    labels = tuple(sorted(known["train"] | {OUTSIDE} if OUTSIDE in known["train"] else known["train"]))
    spans = any(label[:2] in ("B-", "I-") for label in labels)
    made: dict[str, Sequence[Tagged]] = {split: splits[split] for split in ("train", "test")}
    train, test = (sentences(data.tokenizer, made[split], labels, longest) for split in ("train", "test"))
    return Task(folder.name, labels, spans, tuple(train), sample(test, tested or len(test)))


def sample(found: Sequence[Sentence], count: int) -> tuple[Sentence, ...]:
    """At most ``count`` sentences, at equal distances, so that every document keeps its share."""
    if len(found) <= count:
        return tuple(found)
    return tuple(found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int))


def label_positions(task: Task, *, anchors: int = 1) -> pd.DataFrame:
    """Where labels stand in training: ``label, position, count``.

    Args:
        task: the task.
        anchors: special tokens before each sentence; the first word stands right after them.
    """
    rows = [
        (task.labels[label], i + anchors) for s in task.train for i, label in enumerate(s.labels) if label != IGNORED
    ]
    table = pd.DataFrame(rows, columns=["label", "position"])
    return table.groupby(["label", "position"], sort=True).size().rename("count").reset_index()
