"""The models of the study as readers of held-out passages, and tables of how alike they are.

A model is named by a :class:`Ref`: what kind it is (an arm of notebook 03, a mixture's expert, the teacher, an
untrained twin), for which language it was made, and its seed. Models are compared on passages of one language at a
time: pooled over languages, every model that tells them apart would look like every other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import NamedTuple, cast

import pandas as pd
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from mome_utils.config import MomeError
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_config import COMMON
from mome_utils.representations import (
    AGGREGATIONS,
    Aggregation,
    Passage,
    Reader,
    States,
    expert_reader,
    hidden_states,
    layer_reader,
)
from mome_utils.runs import Run
from mome_utils.similarity import NEIGHBOURS, Space, compare_all
from mome_utils.similarity_baselines import ALL, permuted, topic_folds
from mome_utils.sweeps import in_parallel, quiet
from mome_utils.training import build_model

__all__ = [
    "SIMILARITY_MODULES", "Collection", "Pair", "Ref", "expert_pairs", "floor_rows", "kind_pairs", "layer_rows",
    "pair_rows", "seed_pairs", "teacher_pairs",
]

#: Modules whose sources define a table of similarities.
SIMILARITY_MODULES = tuple(
    f"mome_utils.{name}" for name in (
        "representations", "similarity", "similarity_baselines", "similarity_cca", "similarity_inputs",
        "similarity_linear", "similarity_neighbours", "similarity_study",
    )
)


class Ref(NamedTuple):
    """A model: its kind, the language it was made for ("" for all of them), and its seed."""

    kind: str
    made_for: str
    seed: int


class Pair(NamedTuple):
    """Two models, and the language of the passages on which they are compared."""

    a: Ref
    b: Ref
    language: str


class _Source(NamedTuple):
    """Where a model comes from: a run, its weights before or after training, and the name of an expert, or ""."""

    run: Run
    untrained: bool
    expert: str


@dataclass
class Collection:
    """Models that read the same passages. What a model makes of a language is computed once, and kept.

    Attributes:
        passages: by language, what is read.
        pad: token id that fills shorter passages.
        folds: groups of topics that are left out in turn (0: none).
        neighbours: k of the neighbourhood measures; fewer where a language has few passages.
        workers: models that read, and tables of pairs that are made, at once: each in a process of its own.
    """

    passages: Mapping[str, Sequence[Passage]]
    pad: int
    folds: int = 0
    neighbours: int = NEIGHBOURS
    workers: int = 1
    _sources: dict[Ref, _Source] = field(default_factory=dict)
    _states: dict[tuple[Ref, str], States] = field(default_factory=dict)

    def add_run(self, kind: str, made_for: str, run: Run, *, untrained: bool = False) -> None:
        """A finished run's GPT-2, or ``untrained`` the very weights that its training started from.

        Raises:
            MomeError: there is such a model already.
        """
        self._add(Ref(kind, made_for, run.spec.seed), _Source(run, untrained, ""))

    def add_experts(self, kind: str, run: Run, *, common: str = COMMON, untrained: bool = False) -> None:
        """Every expert of a finished mixture: ``kind`` for each language, and ``common`` for the expert of all.

        Raises:
            MomeError: there is such a model already.
        """
        for name in run.spec.model.experts:
            self._add(Ref(kind, name, run.spec.seed), _Source(run, untrained, name))
        if run.spec.model.kind == "moe_ce":
            self._add(Ref(common, "", run.spec.seed), _Source(run, untrained, COMMON))

    def _add(self, ref: Ref, source: _Source) -> None:
        if ref in self._sources:
            raise MomeError(
                f"The collection has a model of kind '{ref.kind}', seed {ref.seed} already: name it otherwise."
            )
        self._sources[ref] = source

    def of(self, kind: str, language: str) -> dict[int, Ref]:
        """By seed, the models of a kind that were made for a language, or for all of them.

        Raises:
            MomeError: there is no such model.
        """
        found = {ref.seed: ref for ref in self._sources if ref.kind == kind and ref.made_for in ("", language)}
        if not found:
            raise MomeError(f"The collection has no model of kind '{kind}' for '{language}': add its runs first.")
        return found

    def read(self, wanted: Iterable[tuple[Ref, str]]) -> None:
        """Let models read languages, where they have not yet; each run is loaded once, and a worker holds one."""
        todo: dict[tuple[int, bool], list[tuple[Ref, str]]] = {}
        for ref, language in dict.fromkeys(wanted):
            if (ref, language) not in self._states:
                source = self._sources[ref]
                todo.setdefault((id(source.run), source.untrained), []).append((ref, language))
        jobs = []
        for parts in todo.values():
            source = self._sources[parts[0][0]]
            texts = {language: [p.ids for p in self.passages[language]] for _, language in parts}
            asked = [(self._sources[ref].expert, language) for ref, language in parts]
            jobs.append((source.run, source.untrained, asked, texts, self.pad))
        read = in_parallel(_read_run, jobs, workers=min(self.workers, len(jobs)))
        for parts, found in zip(todo.values(), read, strict=True):
            self._states.update(zip(parts, found, strict=True))

    def states(self, ref: Ref, language: str) -> States:
        """A model's representations of a language's passages at every layer."""
        self.read([(ref, language)])
        return self._states[ref, language]

    def topics(self, language: str) -> list[str]:
        """The topic of each passage of a language."""
        return [passage.topic for passage in self.passages[language]]

    def space(self, ref: Ref, language: str, aggregation: Aggregation, layer: int = -1, fold: int = ALL) -> Space:
        """One layer's representations, without the topics of a fold."""
        values = self.states(ref, language)[aggregation][layer]
        kept = values if fold == ALL else values[self._folds[language] != fold]
        return Space(kept, neighbours=min(self.neighbours, len(kept) - 1), name=f"Layer {layer} of {ref.kind}")

    def last_layers(self, refs: Iterable[Ref], language: str, aggregation: Aggregation) -> Collection:
        """What models make of a language at their last layers, and no more: small enough to be sent to a process."""
        states: dict[tuple[Ref, str], States] = {
            (ref, language): {aggregation: self.states(ref, language)[aggregation][-1:]} for ref in dict.fromkeys(refs)
        }
        passages = {language: self.passages[language]}
        return Collection(passages, self.pad, self.folds, self.neighbours, _states=states)

    @cached_property
    def _folds(self) -> dict[str, object]:
        return {language: topic_folds(self.topics(language), self.folds) for language in self.passages}


def _read_run(
    run: Run, untrained: bool, asked: Sequence[tuple[str, str]], texts: Mapping[str, Sequence[Sequence[int]]], pad: int,
) -> list[States]:
    """What a run's model, or its experts, make of languages: (name of the expert or "", language), in order."""
    quiet()
    model = _model(run, untrained)
    return [hidden_states(_reader(model, expert), texts[language], pad=pad) for expert, language in asked]


def _model(run: Run, untrained: bool) -> PreTrainedModel:
    return build_model(run.spec.model, run.spec.seed).eval() if untrained else run.model()


def _reader(model: PreTrainedModel, expert: str) -> Reader:
    return expert_reader(cast(MomeForCausalLM, model), expert) if expert else layer_reader(model)


# --------------------------------------------------------------------------------------------------------- pairs


def teacher_pairs(models: Collection, kinds: Sequence[str], *, own: bool = True) -> list[Pair]:
    """Models beside their own teacher (that of their seed), or each beside the teachers of the other seeds."""
    return [
        Pair(ref, teacher, language) for language in models.passages for kind in kinds
        for ref in models.of(kind, language).values() for teacher in models.of("teacher", language).values()
        if (ref.seed == teacher.seed) == own
    ]


def seed_pairs(models: Collection, kinds: Sequence[str]) -> list[Pair]:
    """Two trainings of one kind that differ in their seed, each pair once: the ceiling."""
    return [
        Pair(a, b, language) for language in models.passages for kind in kinds
        for a, b in combinations(models.of(kind, language).values(), 2)
    ]


def kind_pairs(models: Collection, kinds: Sequence[str]) -> list[Pair]:
    """Models of two kinds, for every two kinds and every combination of their seeds."""
    return [
        Pair(a, b, language) for language in models.passages for first, second in combinations(kinds, 2)
        for a in models.of(first, language).values() for b in models.of(second, language).values()
    ]


def expert_pairs(models: Collection, kinds: Sequence[str], *, own: bool = True) -> list[Pair]:
    """A language's expert beside every other expert on that language: of the same seed, so of one mixture, or of the
    other seeds."""
    return [
        Pair(a, b, language) for language in models.passages for kind in kinds
        for a in models.of(kind, language).values()
        for other in models.passages if other != language
        for b in models.of(kind, other).values() if (a.seed == b.seed) == own
    ]


# --------------------------------------------------------------------------------------------------------- scores


def _read(models: Collection, pairs: Sequence[Pair]) -> None:
    models.read((ref, pair.language) for pair in pairs for ref in pair[:2])


def pair_rows(
    models: Collection, pairs: Sequence[Pair], measures: Sequence[str] | None = None, *,
    aggregations: Sequence[Aggregation] = AGGREGATIONS, jackknifed: bool | Sequence[str] = True,
) -> pd.DataFrame:
    """Scores of pairs of models at their last layers, of all topics and without each fold of them.

    Args:
        models: what the pairs name.
        pairs: of models, each with the language that both read.
        measures: names (by default all).
        aggregations: of passages.
        jackknifed: whether, or for which measures, folds of topics are left out too.

    Returns:
        ``kind, made_for, seed, kind_b, made_for_b, seed_b, language, aggregation, measure, fold, value``.
    """
    _read(models, pairs)
    jobs = []
    for language, aggregation in product(dict.fromkeys(pair.language for pair in pairs), aggregations):
        chosen = [pair for pair in pairs if pair.language == language]
        part = models.last_layers((ref for pair in chosen for ref in pair[:2]), language, aggregation)
        jobs.append((part, chosen, measures, aggregation, jackknifed))
    parts = in_parallel(_pair_rows, jobs, workers=min(models.workers, len(jobs)))
    return pd.DataFrame([row for part in parts for row in part], columns=_COLUMNS)


def _pair_rows(
    models: Collection, pairs: Sequence[Pair], measures: Sequence[str] | None, aggregation: Aggregation,
    jackknifed: bool | Sequence[str],
) -> list[tuple]:
    """Rows of :func:`pair_rows` for pairs on one language, in whatever process it lands."""
    rows = []
    readers = dict.fromkeys((ref, pair.language) for pair in pairs for ref in pair[:2])
    with threadpool_limits(1):  # in matrices as small as these, threads wait for each other more than they compute
        for fold in (ALL, *range(models.folds if jackknifed else 0)):
            names = measures if fold == ALL or jackknifed is True else list(jackknifed or ())
            # Every view is computed once for all pairs of a model, and forgotten with the fold.
            spaces = {ref: models.space(ref, language, aggregation, fold=fold) for ref, language in readers}
            for a, b, language in pairs:
                for name, value in compare_all(spaces[a], spaces[b], names).items():
                    rows.append((*a, *b, language, aggregation, name, fold, value))
    return rows


_COLUMNS = ["kind", "made_for", "seed", "kind_b", "made_for_b", "seed_b", "language", "aggregation", "measure", "fold",
            "value"]


def floor_rows(
    models: Collection, pairs: Sequence[Pair], measures: Sequence[str] | None = None, *,
    aggregations: Sequence[Aggregation] = AGGREGATIONS, draws: int = 2,
) -> pd.DataFrame:
    """Scores of pairs whose second model's rows are permuted; columns as :func:`pair_rows`, all topics."""
    rows = []
    _read(models, pairs)
    for (a, b, language), aggregation in product(pairs, aggregations):
        x, y = (models.space(ref, language, aggregation) for ref in (a, b))
        with threadpool_limits(1):
            for name, value in permuted(x, y, measures, draws=draws).items():
                rows.append((*a, *b, language, aggregation, name, ALL, value))
    return pd.DataFrame(rows, columns=_COLUMNS)


def layer_rows(
    models: Collection, pairs: Sequence[Pair], measures: Sequence[str], *,
    aggregations: Sequence[Aggregation] = AGGREGATIONS,
) -> pd.DataFrame:
    """Scores of every pair of layers; columns as :func:`pair_rows`, with ``layer`` and ``layer_b`` (0: embedding)."""
    rows = []
    _read(models, pairs)
    for language, aggregation in product(dict.fromkeys(pair.language for pair in pairs), aggregations):
        chosen = [pair for pair in pairs if pair.language == language]
        layers = {ref: [models.space(ref, language, aggregation, layer)
                        for layer in range(len(models.states(ref, language)[aggregation]))]
                  for ref in dict.fromkeys(ref for pair in chosen for ref in pair[:2])}
        with threadpool_limits(1):
            for a, b, _ in chosen:
                for (i, x), (j, y) in product(enumerate(layers[a]), enumerate(layers[b])):
                    for name, value in compare_all(x, y, measures).items():
                        rows.append((*a, *b, language, aggregation, name, ALL, value, i, j))
    return pd.DataFrame(rows, columns=[*_COLUMNS, "layer", "layer_b"])
