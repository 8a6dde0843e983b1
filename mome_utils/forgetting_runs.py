"""Scores of finished runs as notebook 06 needs them: after every stage, before any, by class of token, of JEET."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch

from mome_utils.artifacts import digest
from mome_utils.config import MomeError
from mome_utils.evaluation import score_documents
from mome_utils.forgetting_causes import layer_similarity, weight_drift
from mome_utils.forgetting_growth import score_growing
from mome_utils.moe import MomeForCausalLM
from mome_utils.runs import Run, torch_threads
from mome_utils.token_classes import function_words, score_classes
from mome_utils.training import TrainSpec, build_model

if TYPE_CHECKING:
    from mome_utils.routing import TokenRouter
    from mome_utils.study import Study

__all__ = ["changes_inside", "class_rows", "growing_rows", "stage_rows", "untrained_rows"]

_MODULES = ("mome_utils.evaluation", "mome_utils.models")
_CLASSES = ("mome_utils.evaluation", "mome_utils.token_classes")
_GROWTH = tuple(f"mome_utils.{m}" for m in ("evaluation", "forgetting_growth", "moe", "moe_dispatch", "routing"))


def stage_rows(study: Study, arms: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Test documents scored after every stage of each run: as :meth:`Study.score`, with ``arm`` and ``stage`` (from 1).

    The runs of an arm must have one order of the languages.
    """
    tables = []
    for arm, runs in arms.items():
        for i, end in enumerate(runs[0].spec.snapshots):
            tables.append(study.score(runs, step=end).assign(arm=arm, stage=i + 1))
    return pd.concat(tables, ignore_index=True)


def untrained_rows(study: Study, runs: Sequence[Run]) -> pd.DataFrame:
    """The same documents scored by the untrained models that the runs started from, a seed each."""
    data, tables = study.data(), []
    for run in runs:
        spec = run.spec

        def compute(spec: TrainSpec = spec) -> pd.DataFrame:
            model = build_model(spec.model, spec.seed).eval()
            documents = [d for language in study.languages for d in data.documents("test", language)]
            return score_documents(
                model, data.tokenizer, documents,
                block_size=data.block_size, stride=study.profile.stride,
            )

        inputs = {"model": spec.model, "seed": spec.seed, "languages": study.languages}
        with torch_threads(study.profile.threads):
            rows = study.cached_rows("untrained", inputs, compute, modules=_MODULES)
        tables.append(rows.assign(seed=spec.seed))
    return pd.concat(tables, ignore_index=True)


def class_rows(study: Study, runs: Sequence[Run], language: str) -> pd.DataFrame:
    """Documents of a language scored by class of token after every stage: ``seed, stage, token_class, …``.

    Columns otherwise as of :func:`~mome_utils.token_classes.score_classes`; function words are the most frequent ones
    of the language's training documents.
    """
    data, tables = study.data(), []
    frequent = {language: function_words([d.text for d in data.documents("train", language)])}
    documents = data.documents("test", language)
    for run in runs:
        for i, end in enumerate(run.spec.snapshots):

            def compute(run: Run = run, end: int = end) -> pd.DataFrame:
                model = run.model(end)
                return score_classes(
                    model, data.tokenizer, documents, frequent,
                    block_size=data.block_size, stride=study.profile.stride,
                )

            inputs = {"model": run.key, "after": end, "language": language}
            with torch_threads(study.profile.threads):
                rows = study.cached_rows("classes", inputs, compute, modules=_CLASSES)
            tables.append(rows.assign(seed=run.spec.seed, stage=i + 1))
    return pd.concat(tables, ignore_index=True)


def changes_inside(runs: Sequence[Run], ids: torch.Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drift of the weights and similarity of the layers between the end of the first stage and of each later one.

    Args:
        runs: sequential runs of one order of the languages.
        ids: sequences ``[n, T]`` of the first language.

    Returns:
        The tables of :func:`~mome_utils.forgetting_causes.weight_drift` and
        :func:`~mome_utils.forgetting_causes.layer_similarity` with ``stage`` (the language learned last) and ``seed``.
    """
    drift, layers = [], []
    for run in runs:
        first = run.model(run.spec.snapshots[0])
        for language, end in zip(run.spec.languages[1:], run.spec.snapshots[1:], strict=True):
            later, who = run.model(end), {"stage": language, "seed": run.spec.seed}
            drift.append(weight_drift(first, later).assign(**who))
            layers.append(layer_similarity(first, later, ids).assign(**who))
    return pd.concat(drift, ignore_index=True), pd.concat(layers, ignore_index=True)


def growing_rows(study: Study, runs: Sequence[Run], routers: Sequence[TokenRouter | None]) -> pd.DataFrame:
    """JEET as it was after each stage, scored as by :func:`~mome_utils.forgetting_growth.score_growing`, with ``seed``.

    Args:
        runs: of :func:`~mome_utils.recipes_continual.growing_spec`.
        routers: of each stage, the last for all languages.
    """
    data, tables = study.data(), []
    documents = [d for language in study.languages for d in data.documents("test", language)]
    for run in runs:

        def compute(run: Run = run) -> pd.DataFrame:
            models = []
            for end in run.spec.snapshots:
                model = run.model(end)
                if not isinstance(model, MomeForCausalLM):
                    raise MomeError("Only a mixture grows by experts: give runs of growing_spec.")
                model.set_router(study.router())
                models.append(model)
            return score_growing(
                models, data.tokenizer, documents, block_size=data.block_size, stride=study.profile.stride,
                routers=routers,
            )

        inputs = {"grown": run.key, "routers": _digest_of(routers), "router": _digest_of([study.router()])}
        with torch_threads(study.profile.threads):
            rows = study.cached_rows("jeet_growing", inputs, compute, modules=_GROWTH)
        tables.append(rows.assign(seed=run.spec.seed))
    return pd.concat(tables, ignore_index=True)


def _digest_of(routers: Sequence[TokenRouter | None]) -> str:
    """A name for what routers compute."""
    return digest([None if r is None else [r.weight.tolist(), r.bias.tolist(), r.idf.tolist()] for r in routers])
