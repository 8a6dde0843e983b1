"""Scores of finished runs as notebook 06 needs them: after every stage, before any, by class of token, of mixtures.

Every table is kept in the store; those that are missing are computed side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mome_utils.artifacts import digest
from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.dataset import StudyData
from mome_utils.evaluation import score_documents
from mome_utils.forgetting_causes import layer_similarity, weight_drift
from mome_utils.forgetting_growth import score_growing
from mome_utils.moe import MomeForCausalLM
from mome_utils.runs import Run, torch_threads
from mome_utils.sweeps import on_device, quiet
from mome_utils.token_classes import function_words, score_classes
from mome_utils.training import TrainSpec, build_model

if TYPE_CHECKING:
    from mome_utils.routing import TokenRouter
    from mome_utils.study import Study

__all__ = [
    "changes_inside", "class_job", "class_rows", "growing_job", "growing_rows", "mixture_job", "mixture_rows",
    "stage_rows", "untrained_job", "untrained_rows",
]

_MODULES = ("mome_utils.evaluation", "mome_utils.models")
_CLASSES = ("mome_utils.evaluation", "mome_utils.token_classes")
_GROWTH = tuple(
    f"mome_utils.{m}"
    for m in ("evaluation", "forgetting_growth", "moe", "moe_dispatch", "moe_inference", "routing")
)


def stage_rows(study: Study, arms: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Test documents scored after every stage of each run: as :meth:`Study.score`, with ``arm`` and ``stage`` (from 1).

    The runs of an arm must have one order of the languages.
    """
    snapshots = [
        (arm, stage, run, end) for arm, runs in arms.items()
        for stage, end in enumerate(runs[0].spec.snapshots, start=1) for run in runs
    ]
    tables = study.score_snapshots([(run, end) for _, _, run, end in snapshots])
    return pd.concat([
        table.assign(arm=arm, stage=stage) for (arm, stage, *_), table in zip(snapshots, tables, strict=True)
    ], ignore_index=True)


def untrained_rows(study: Study, runs: Sequence[Run]) -> pd.DataFrame:
    """The same documents scored by the untrained models that the runs started from, a seed each."""
    data, languages = study.data().path, tuple(study.languages)
    wanted = [
        ({"model": run.spec.model, "seed": run.spec.seed, "languages": study.languages},
         (run.spec, languages, study.profile.stride, data))
        for run in runs
    ]
    tables = study.cached_tables("untrained", wanted, untrained_job, modules=_MODULES)
    return _with_seeds(tables, runs)


def untrained_job(spec: TrainSpec, languages: Sequence[str], stride: int, data_folder: Path) -> pd.DataFrame:
    """Test documents scored by the model that a run begins with, as by ``score_documents``."""
    quiet()
    data = StudyData.load(data_folder)
    with torch_threads(spec.threads):
        return score_documents(
            on_device(build_model(spec.model, spec.seed).eval()), data.tokenizer, _test_documents(data, languages),
            block_size=data.block_size, stride=stride,
        )


def class_rows(study: Study, runs: Sequence[Run], language: str) -> pd.DataFrame:
    """Documents of a language scored by class of token after every stage: ``seed, stage, token_class, …``.

    Columns otherwise as of :func:`~mome_utils.token_classes.score_classes`; function words are the most frequent ones
    of the language's training documents.
    """
    snapshots = [(run, stage, end) for run in runs for stage, end in enumerate(run.spec.snapshots, start=1)]
    wanted = [
        ({"model": run.key, "after": end, "language": language},
         (run, end, language, study.profile.stride, study.data().path))
        for run, _, end in snapshots
    ]
    tables = study.cached_tables("classes", wanted, class_job, modules=_CLASSES)
    return pd.concat([
        table.assign(seed=run.spec.seed, stage=stage)
        for (run, stage, _), table in zip(snapshots, tables, strict=True)
    ], ignore_index=True)


def class_job(run: Run, step: int, language: str, stride: int, data_folder: Path) -> pd.DataFrame:
    """The rows of :func:`class_rows` of one snapshot."""
    quiet()
    data = StudyData.load(data_folder)
    frequent = {language: function_words([d.text for d in data.documents("train", language)])}
    with torch_threads(run.spec.threads):
        return score_classes(
            on_device(run.model(step)), data.tokenizer, data.documents("test", language), frequent,
            block_size=data.block_size, stride=stride,
        )


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


def mixture_rows(
    study: Study, experts: Sequence[Mapping[str, Run]], routers: Sequence[TokenRouter | None]
) -> pd.DataFrame:
    """PLE as it was after each stage, scored as by :func:`~mome_utils.forgetting_growth.score_growing`, with ``seed``.

    Args:
        experts: of each seed the run of each language, in the order of the stages.
        routers: of each stage, the last for all languages.
    """
    settings = {"routers": _digest_of(routers), "router": _digest_of([study.router()])}
    wanted = [
        ({"experts": [run.key for run in own.values()]} | settings, (dict(own), *_growth_arguments(study, routers)))
        for own in experts
    ]
    tables = study.cached_tables("growing", wanted, mixture_job, modules=_GROWTH)
    return _with_seeds(tables, [next(iter(own.values())) for own in experts])


def mixture_job(experts: Mapping[str, Run], router: TokenRouter, *settings: Any) -> pd.DataFrame:
    """The rows of :func:`mixture_rows` of one seed."""
    quiet()
    model = MomeForCausalLM.from_experts({language: run.folder for language, run in experts.items()}, router)
    return _scored([model.eval()], *settings)


def growing_rows(study: Study, runs: Sequence[Run], routers: Sequence[TokenRouter | None]) -> pd.DataFrame:
    """JEET as it was after each stage, scored as by :func:`~mome_utils.forgetting_growth.score_growing`, with ``seed``.

    Args:
        runs: of :func:`~mome_utils.recipes_continual.growing_spec`.
        routers: of each stage, the last for all languages.

    Raises:
        MomeError: a run that is no mixture.
    """
    if any(run.spec.model.kind == "gpt2" for run in runs):
        raise MomeError("Only a mixture grows by experts: give runs of growing_spec.")
    settings = {"routers": _digest_of(routers), "router": _digest_of([study.router()])}
    wanted = [({"grown": run.key} | settings, (run, *_growth_arguments(study, routers))) for run in runs]
    return _with_seeds(study.cached_tables("jeet_growing", wanted, growing_job, modules=_GROWTH), runs)


def growing_job(run: Run, router: TokenRouter, *settings: Any) -> pd.DataFrame:
    """The rows of :func:`growing_rows` of one run."""
    quiet()
    models = [model for end in run.spec.snapshots if isinstance(model := run.model(end), MomeForCausalLM)]
    for model in models:
        model.set_router(router)
    return _scored(models, *settings)


def _growth_arguments(study: Study, routers: Sequence[TokenRouter | None]) -> tuple[Any, ...]:
    """What the jobs of growing mixtures take beside the experts."""
    return study.router(), list(routers), study.profile.threads, study.profile.stride, study.data().path


def _scored(
    models: Sequence[MomeForCausalLM], routers: Sequence[TokenRouter | None], threads: int, stride: int, folder: Path
) -> pd.DataFrame:
    """A growing mixture's scores of all test documents; one model stands for all stages, else each has its own."""
    data = StudyData.load(folder)
    documents = _test_documents(data, models[-1].languages)
    with torch_threads(threads):
        return score_growing(
            models[0] if len(models) == 1 else models, data.tokenizer, documents, block_size=data.block_size,
            stride=stride, routers=routers,
        )


def _test_documents(data: StudyData, languages: Sequence[str]) -> list[Document]:
    return [document for language in languages for document in data.documents("test", language)]


def _with_seeds(tables: Sequence[pd.DataFrame], runs: Sequence[Run]) -> pd.DataFrame:
    """Tables in one, with a column of the seed of each one's run."""
    return pd.concat(
        [table.assign(seed=run.spec.seed) for table, run in zip(tables, runs, strict=True)], ignore_index=True
    )


def _digest_of(routers: Sequence[TokenRouter | None]) -> str:
    """A name for what routers compute."""
    return digest([None if r is None else {k: v.tolist() for k, v in r.state_dict().items()} for r in routers])
