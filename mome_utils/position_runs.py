"""Training for notebook 08, stored like every other run: pretraining by language modelling, then classification.

A run takes seconds, so it is made in one go: an unfinished one leaves its log alone and is made again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mome_utils.artifacts import DamagedArtifact, Store, digest, read_manifest, source_digest
from mome_utils.batches import ScheduledBlocks
from mome_utils.config import MomeError, Shape
from mome_utils.dataset import StudyData
from mome_utils.models import IGNORED, next_tokens
from mome_utils.position_cures import CURES, BatchesTwice, Collator, TwoSteps, make_collator
from mome_utils.position_models import build_position_model, classifier_from, load_classifier
from mome_utils.position_tasks import Task, TaskSpec, make_task
from mome_utils.run_log import RunLog
from mome_utils.runs import STAGE as LANGUAGE_MODELS
from mome_utils.runs import torch_threads
from mome_utils.schedules import schedule
from mome_utils.tagging import Sentence
from mome_utils.training import save_model

__all__ = [
    "STAGE", "TASKS", "ClassifySpec", "LanguageModelling", "PositionRun", "PretrainSpec", "examples_of", "load_task",
    "run_key", "save_task", "stored_task", "train_or_load",
]

STAGE = "position_runs"
TASKS = "position_tasks"
_TASK_MODULES = tuple(
    f"mome_utils.{m}" for m in ("position_tasks", "tagging", "tagging_entities", "tagging_python", "token_classes")
)
_PRETRAIN_MODULES = tuple(f"mome_utils.{m}" for m in ("models", "position_models", "position_runs", "schedules"))
_CLASSIFY_MODULES = (*_PRETRAIN_MODULES, "mome_utils.position_cures")


@dataclass(frozen=True)
class PretrainSpec:
    """Language modelling on the study's blocks: masked for an encoder, of the next token for a decoder (``causal``).

    ``data`` is the data set's fingerprint; every batch holds the languages equally. ``masked`` is the share of tokens
    that an encoder predicts (80 % of them masked, 10 % replaced, 10 % left, as in BERT; twice its 15 %, because short
    runs learn more from more targets: Wettig et al. 2023, arXiv 2202.08005).
    """

    data: str
    languages: tuple[str, ...]
    position: str
    causal: bool
    shape: Shape
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int
    masked: float = 0.3
    warmup: float = 0.1
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.masked < 1 or min(self.steps, self.batch_size) < 1:
            raise MomeError("A pretraining needs steps, a batch, and a share of masked tokens between 0 and 1.")


@dataclass(frozen=True)
class ClassifySpec:
    """Token classification from a pretrained model: each of ``batches`` is taken once for each of ``each``.

    ``start`` is the key of the pretrained run in the stage ``origin``; ``task`` that of the stored task; ``each`` one
    or two names of :data:`mome_utils.position_cures.CURES`, the steps on every batch: ``("plain", "rps")`` is random
    position shifting as released, ``("plain", "plain")`` its control.
    """

    data: str
    task: str
    start: str
    origin: str
    each: tuple[str, ...]
    batches: int
    batch_size: int
    learning_rate: float
    max_positions: int
    seed: int
    threads: int
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if len(self.each) not in (1, 2):
            raise MomeError(f"A batch has one step or two, not {len(self.each)}.")
        for name in self.each:
            if name not in CURES:
                raise MomeError(f"There is no cure '{name}': choose one of {', '.join(CURES)}.")
        if self.origin not in (STAGE, LANGUAGE_MODELS) or min(self.batches, self.batch_size) < 1:
            raise MomeError(f"A classifier starts from {STAGE} or {LANGUAGE_MODELS} and learns from a batch or more.")


Spec = PretrainSpec | ClassifySpec


def _modules(spec: Spec) -> tuple[str, ...]:
    return _PRETRAIN_MODULES if isinstance(spec, PretrainSpec) else _CLASSIFY_MODULES


def run_key(spec: Spec) -> str:
    """Name of a run: its spec and the sources that define its numbers."""
    return digest({"kind": type(spec).__name__, "spec": spec, "sources": [source_digest(m) for m in _modules(spec)]})


@dataclass(frozen=True)
class PositionRun:
    """A finished run."""

    spec: Spec
    key: str
    folder: Path

    def model(self) -> PreTrainedModel:
        """The classifier, in evaluation mode and float32."""
        return load_classifier(self.folder)

    def history(self) -> pd.DataFrame:
        """One row per step: ``step, loss`` (nats per predicted token)."""
        return pd.read_parquet(self.folder / "history.parquet")

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the manifest records: seconds of training, mean loss of the last tenth of the steps."""
        return read_manifest(self.folder).metrics


# --- tasks in the store


def save_task(store: Store, key: str, task: Task, inputs: Mapping[str, str], parameters: Any) -> str:
    """Keep a task's sentences under a key, which is returned."""
    rows = [
        {"split": split, **{f.name: getattr(s, f.name) for f in dataclasses.fields(s)}}
        for split in ("train", "test") for s in getattr(task, split)
    ]
    about = {"name": task.name, "labels": list(task.labels), "spans": task.spans}
    with store.create(TASKS, key, inputs=inputs, parameters=parameters, modules=_TASK_MODULES) as result:
        pd.DataFrame(rows).to_parquet(result.folder / "sentences.parquet", index=False)
        (result.folder / "task.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return key


def load_task(store: Store, key: str) -> Task:
    """A stored task.

    Raises:
        MissingArtifact: names the notebook that makes it.
    """
    folder = store.require(TASKS, key, notebook="08_position_bias")
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    table = pd.read_parquet(folder / "sentences.parquet")
    found = {
        split: tuple(
            Sentence(r.document, r.language, tuple(map(int, r.ids)), tuple(map(int, r.labels)))
            for r in table[table["split"] == split].itertuples(index=False)
        ) for split in ("train", "test")
    }
    return Task(about["name"], tuple(about["labels"]), about["spans"], found["train"], found["test"])


def stored_task(spec: TaskSpec, store: Store, data: StudyData) -> str:
    """The key of a task, which is made if it is not in the store or damaged."""
    sources = [source_digest(m) for m in _TASK_MODULES]
    key = digest({"spec": spec, "data": data.fingerprint, "sources": sources})
    try:
        if store.load(TASKS, key) is not None:
            return key
    except DamagedArtifact:
        shutil.rmtree(store.path(TASKS, key))
    return save_task(store, key, make_task(spec, data), {"data": data.fingerprint}, spec)


def examples_of(sentences: Sequence[Sentence], bos: int) -> list[dict[str, list[int]]]:
    """Sentences as a collator wants them: ids behind the special token that begins a sequence, and labels."""
    return [{"input_ids": [bos, *s.ids], "labels": [IGNORED, *s.labels]} for s in sentences]


# --- training


def train_or_load(spec: Spec, store: Store, data: StudyData) -> PositionRun:
    """The finished run of a spec: loaded, or trained (again if it is damaged).

    Raises:
        MissingArtifact: the run it starts from, or its task, is not in the store.
    """
    key = run_key(spec)
    try:
        if (folder := store.load(STAGE, key)) is not None:
            return PositionRun(spec, key, folder)
    except DamagedArtifact:
        shutil.rmtree(store.path(STAGE, key))
    started = time.monotonic()
    work = store.root / STAGE / f"{key}.unfinished"
    with torch_threads(spec.threads), RunLog(work, f"seed {spec.seed}, threads: {spec.threads}") as log:
        if isinstance(spec, PretrainSpec):
            model, losses = _pretrain(spec, data, log)
        else:
            model, losses = _classify(spec, store, data, log)
    inputs = {"data": spec.data}
    if isinstance(spec, ClassifySpec):
        inputs |= {"start": spec.start, "task": spec.task}
    with store.create(STAGE, key, inputs=inputs, parameters=spec, modules=_modules(spec)) as result:
        save_model(model, result.folder)
        log.keep(result.folder)
        history = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
        history.to_parquet(result.folder / "history.parquet", index=False)
        result.metrics.update(
            seconds=round(time.monotonic() - started, 1), loss=float(np.mean(losses[-max(1, len(losses) // 10) :]))
        )
    shutil.rmtree(work)
    return PositionRun(spec, key, store.path(STAGE, key))


class LanguageModelling:
    """Blocks ``[B, T]`` to what a model reads and predicts: the next token, or masked ones.

    Args:
        causal: next token.
        mask: id of the token that hides another.
        vocab_size: tokens to replace with.
        share: part of the tokens that are predicted when masking.
        seed: of the choice.
    """

    def __init__(self, *, causal: bool, mask: int, vocab_size: int, share: float, seed: int) -> None:
        self.causal, self.mask, self.vocab_size, self.share = causal, mask, vocab_size, share
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        if self.causal:
            return {"input_ids": ids, "labels": next_tokens(ids)}
        chosen, how = torch.rand((2, *ids.shape), generator=self.generator)
        asked = chosen < self.share
        other = torch.randint(self.vocab_size, ids.shape, generator=self.generator)
        read = torch.where(asked & (how < 0.8), self.mask, torch.where(asked & (how >= 0.9), other, ids))
        return {"input_ids": read, "labels": torch.where(asked, ids, IGNORED)}


class _InOrder(Sampler[int]):
    """Indices as they are."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class _Trainer(Trainer):
    """A Trainer whose order of examples is given, and which notes the loss of each step."""

    def __init__(self, order: Sampler[int], **options: Any) -> None:
        super().__init__(**options)
        self.order = order
        self.losses: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.losses.append(loss.item())
        return loss


def _fit(
    spec: Spec, model: PreTrainedModel, dataset: Any, order: Sampler[int], collator: Callable[..., Any], steps: int,
    log: RunLog,
) -> list[float]:
    """Train by AdamW with a linear warm-up and decay; the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, optim="adamw_torch_fused",
            lr_scheduler_type="linear", warmup_steps=max(1, round(spec.warmup * steps)), seed=spec.seed,
            use_cpu=not torch.cuda.is_available(), logging_strategy="no", save_strategy="no", report_to="none",
            remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
        )
        trainer = _Trainer(
            order, model=model.train(), args=arguments, train_dataset=dataset, data_collator=collator,
            callbacks=[log],
        )
        trainer.model_accepts_loss_kwargs = False  # our losses are means over the batch
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.losses


def _pretrain(spec: PretrainSpec, data: StudyData, log: RunLog) -> tuple[PreTrainedModel, list[float]]:
    blocks = [data.block_array("train", language) for language in spec.languages]
    sizes = {language: len(own) for language, own in zip(spec.languages, blocks, strict=True)}
    order = schedule("balanced", sizes, steps=spec.steps, batch_size=spec.batch_size, seed=spec.seed)
    model = build_position_model(
        spec.position, spec.shape, causal=spec.causal, vocab_size=data.vocab_size, max_positions=data.block_size,
        seed=spec.seed,
    )
    collator = LanguageModelling(
        causal=spec.causal, mask=data.tokenizer.unk_token_id, vocab_size=data.vocab_size, share=spec.masked,
        seed=spec.seed,
    )
    feed = ScheduledBlocks(order, blocks, None)
    return model, _fit(spec, model, feed, _InOrder(len(feed)), collator, spec.steps, log)


def _classify(
    spec: ClassifySpec, store: Store, data: StudyData, log: RunLog
) -> tuple[PreTrainedModel, list[float]]:
    task = load_task(store, spec.task)
    folder = store.require(
        spec.origin, spec.start,
        notebook="08_position_bias" if spec.origin == STAGE else "03_kd_alpha_comparison",
    )
    model = classifier_from(folder, len(task.labels), spec.seed)
    examples = examples_of(task.train, data.tokenizer.bos_token_id)
    times = len(spec.each)
    a_pass = len(examples) // spec.batch_size
    if not a_pass:
        raise MomeError(f"'{task.name}' has {len(examples)} sentences, fewer than a batch of {spec.batch_size}.")
    order = BatchesTwice(len(examples), spec.batch_size, math.ceil(spec.batches / a_pass), spec.seed, times)
    made: list[Collator] = [
        make_collator(name, pad=data.tokenizer.pad_token_id, max_positions=spec.max_positions, seed=spec.seed + i)
        for i, name in enumerate(spec.each)
    ]
    collator = made[0] if times == 1 else TwoSteps(made[0], made[1])
    return model, _fit(spec, model, examples, order, collator, spec.batches * times, log)
