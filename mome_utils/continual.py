"""Training on one language after the other with something done against forgetting: specs, trainer, and run store.

A :class:`ContinualSpec` is a :class:`~mome_utils.training.TrainSpec` for the whole course, and what its later stages
do differently. It lives beside the other runs and gives the same guarantees: :func:`train_or_load` loads a finished
run, goes on with a half-finished one, and makes a damaged one again. Both functions here take any spec, so a caller
need not know which kind it has.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback

from mome_utils import runs
from mome_utils.artifacts import DamagedArtifact, Store, digest, source_digest
from mome_utils.batches import ScheduledBlocks, ValidationSet, model_logits, vocabulary_bytes
from mome_utils.config import MomeError
from mome_utils.continual_methods import METHODS, Pull, fisher_diagonal, flat_like, summed, with_replay
from mome_utils.dataset import StudyData
from mome_utils.distillation import shifted_divergence
from mome_utils.models import shifted_ce
from mome_utils.run_log import RunLog
from mome_utils.schedules import schedule
from mome_utils.training import LMTrainer, TrainSpec, build_model, load_gpt2, save_model, sound_checkpoint

__all__ = ["ContinualSpec", "ContinualTrainer", "run_key", "run_modules", "train_or_load"]

#: LwF compares distributions at this temperature, as its authors do.
LWF_TEMPERATURE = 2.0
#: Sequences of a stage from which its Fisher diagonal is estimated.
FISHER_SEQUENCES = 64
#: Parameters that the experts of a joint mixture share.
SHARED = ("wte.", "wpe.", "lm_head.")


@dataclass(frozen=True)
class ContinualSpec(TrainSpec):
    """A course through languages, and the rule by which its stages follow each other.

    Stages are equal: stage ``i`` of ``len(languages)`` ends at step ``steps · (i + 1) / len(languages)``, where the
    weights are kept (``snapshots`` must name these steps). The first stage is plain training under every method, so
    runs that differ in the method alone are bit for bit the same up to its end.

    Attributes:
        method: a key of :data:`~mome_utils.continual_methods.METHODS`.
        strength: what the method takes it for.
        optimizer_state: at the start of a later stage AdamW's moments are ``kept`` or ``fresh``.
        warm_up_again: whether later stages begin with a warm-up of their own. (Without it the rate is constant after
            the first one; ``rate`` multiplies it after the first stage.)
        freeze_shared: a joint mixture's embeddings and output projection stop learning after the first stage.
        start: key of a finished run whose final weights this one starts from; ``None`` starts untrained.
    """

    method: str = "plain"
    strength: float = 0.0
    optimizer_state: Literal["kept", "fresh"] = "kept"
    warm_up_again: bool = False
    freeze_shared: bool = False
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise MomeError(f"There is no method '{self.method}' against forgetting: choose from {', '.join(METHODS)}.")
        if self.objective is not None or self.select_best or self.lr_schedule != "constant":
            raise MomeError(
                "A continual run learns from text alone, at a constant rate, and keeps its last weights: "
                "set objective=None, lr_schedule='constant' and select_best=False."
            )
        if self.sampler != "sequential" or self.steps % len(self.languages):
            raise MomeError("A continual run needs the sampler 'sequential' and equal stages: adjust sampler or steps.")
        if self.groups:
            raise MomeError("A continual run learns from all topic groups: set groups=().")
        if self.snapshots != self.stage_ends:
            raise MomeError(f"A continual run keeps the weights after each stage: set snapshots to {self.stage_ends}.")
        if (self.strength > 0) == (self.method == "plain") or self.strength < 0:
            raise MomeError(f"The method '{self.method}' cannot have strength {self.strength}: plain has 0.")
        if self.method == "replay" and self.strength >= 1:
            raise MomeError(f"The share of replayed sequences must be below 1, not {self.strength}.")
        if self.model.kind != "gpt2" and self.method not in ("plain", "rate"):
            raise MomeError("Replay, pulls and distillation here are for one dense model: choose the kind 'gpt2'.")
        if self.freeze_shared and self.model.kind != "jeet":
            raise MomeError("Only a mixture of the kind 'jeet' has shared parts to freeze.")

    @property
    def stage_steps(self) -> int:
        """Steps of one stage."""
        return self.steps // len(self.languages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The step after which each stage ends."""
        return tuple(self.stage_steps * (i + 1) for i in range(len(self.languages)))


def run_modules(spec: TrainSpec) -> tuple[str, ...]:
    """Modules whose source defines a run's numbers: :func:`mome_utils.runs.run_modules`, and what is added here."""
    names = runs.run_modules(spec)
    if isinstance(spec, ContinualSpec):
        names += ("mome_utils.continual", "mome_utils.continual_methods")
        if spec.method == "lwf":
            names += ("mome_utils.divergences", "mome_utils.distillation")
    return names


def run_key(spec: TrainSpec) -> str:
    """Name of a run of any kind: its spec and the sources that define its numbers."""
    if not isinstance(spec, ContinualSpec):
        return runs.run_key(spec)
    return digest({"spec": spec, "sources": [source_digest(m) for m in run_modules(spec)]})


def train_or_load(spec: TrainSpec, store: Store, data: StudyData) -> runs.Run:
    """The finished run of a spec of any kind: loaded, resumed or trained.

    Raises:
        MissingArtifact: the run that the spec starts from, or the teacher that it names, has not been trained.
    """
    if not isinstance(spec, ContinualSpec):
        return runs.train_or_load(spec, store, data)
    key = run_key(spec)
    try:
        if (folder := store.load(runs.STAGE, key)) is not None:
            return runs.Run(spec, key, folder)
    except DamagedArtifact:
        shutil.rmtree(store.path(runs.STAGE, key))  # a damaged run is made again
    work = store.root / runs.STAGE / f"{key}.unfinished"
    about = f"{spec.method}, seed {spec.seed}, {spec.dtype}, threads: {spec.threads}"
    with runs.torch_threads(spec.threads), RunLog(work, about) as log:
        _train(spec, key, store, data, log)
    return runs.Run(spec, key, store.path(runs.STAGE, key))


class _StageStart(TrainerCallback):
    """Tells the trainer when a stage begins, and after a resumption in which one it is."""

    def __init__(self, trainer: ContinualTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.enter(state.global_step)


class ContinualTrainer(LMTrainer):
    """Cross-entropy on a sequence of languages, with what the spec's method adds after the first stage.

    ``records`` hold per step ``loss``, the minimised one, and under a method with a penalty also ``ce`` and
    ``penalty`` (nats per token).
    """

    spec: ContinualSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = 0
        self.pull: Pull | None = None
        self.previous: PreTrainedModel | None = None
        self._fishers: list[dict[str, Tensor]] = []  # of the stages so far; a resumed run makes them again
        self.add_callback(_StageStart(self))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rate by step: see :class:`ContinualSpec`."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, lambda step: self.rate_at(step))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def rate_at(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        stage = min(step // self.spec.stage_steps, len(self.spec.languages) - 1)
        factor = self.spec.strength if self.spec.method == "rate" and stage else 1.0
        into = step - stage * self.spec.stage_steps if self.spec.warm_up_again else step
        return factor * min(1.0, into / self.args.warmup_steps)

    def enter(self, step: int) -> None:
        """Prepare what the stage of this step needs, once."""
        stage = step // self.spec.stage_steps
        if self.spec.optimizer_state == "fresh" and stage and step % self.spec.stage_steps == 0:
            optimizer: Any = self.optimizer
            getattr(optimizer, "optimizer", optimizer).state.clear()  # accelerate wraps it
        if stage == self.stage:
            return
        self.stage = stage
        if self.spec.freeze_shared:
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(not name.startswith(SHARED))
        if self.spec.method == "lwf":
            self.previous = self._snapshot(stage - 1)
        if self.spec.method in ("ewc", "l2"):
            self.pull = self._pull(stage)

    def _snapshot(self, stage: int) -> PreTrainedModel:
        """The model as it was at the end of a stage, in evaluation mode on the training device."""
        folder = Path(str(self.args.output_dir)) / "snapshots" / f"step-{self.spec.stage_ends[stage]:06d}"
        model = load_gpt2(folder).eval().requires_grad_(True)
        torch.nn.Module.to(model, self.args.device)
        return model

    def _pull(self, stage: int) -> Pull:
        """The pull towards the end of the stage before, by the Fisher diagonals of all stages before."""
        for earlier in range(len(self._fishers), stage):
            model = self._snapshot(earlier)
            self._fishers.append(fisher_diagonal(model, self._sequences_of(earlier), seed=self.spec.seed + earlier))
        anchor = {name: parameter.detach() for name, parameter in self._snapshot(stage - 1).named_parameters()}
        precision = summed(self._fishers)
        return Pull(anchor, flat_like(precision) if self.spec.method == "l2" else precision, self.spec.strength)

    def _sequences_of(self, stage: int) -> Tensor:
        """Sequences [n, T] that a stage showed, spread evenly over it."""
        first = stage * self.spec.stage_steps * self.spec.batch_size
        shown = self.spec.stage_steps * self.spec.batch_size
        places = first + np.unique(np.linspace(0, shown - 1, min(FISHER_SEQUENCES, shown)).astype(int))
        ids: Tensor = self.feed.__getitems__(places.tolist())["input_ids"]
        return ids

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.pull is None and self.previous is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids = inputs["input_ids"]
        logits = model_logits(model, ids, inputs["languages"])
        ce = shifted_ce(logits, ids)
        if self.pull is not None:
            penalty = self.pull.penalty(self.network)
        else:
            with torch.no_grad():
                before = model_logits(self.previous, ids, inputs["languages"])  # type: ignore[arg-type]
            distance = shifted_divergence("forward_kl", logits, before, ids, LWF_TEMPERATURE)
            penalty = self.spec.strength * distance
        loss = ce + penalty
        both: list[float] = torch.stack([ce, penalty]).detach().tolist()
        self.record(loss=sum(both), ce=both[0], penalty=both[1])
        return (loss, logits) if return_outputs else loss


def _train(spec: ContinualSpec, key: str, store: Store, data: StudyData, log: RunLog) -> None:
    work = log.folder
    started = time.monotonic()
    trainer = _trainer(spec, work, store, data)
    trainer.add_callback(log)
    checkpoint = sound_checkpoint(work)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
    history = runs._history(trainer.records)
    last = history.dropna(subset=["val_mean"]).iloc[-1]
    inputs = {"data": spec.data} | ({"start": spec.start} if spec.start else {})
    with store.create(runs.STAGE, key, inputs=inputs, parameters=spec, modules=run_modules(spec)) as result:
        save_model(trainer.network, result.folder)
        log.keep(result.folder)
        history.to_parquet(result.folder / "history.parquet", index=False)
        shutil.copytree(work / "snapshots", result.folder / "snapshots")
        result.metrics.update(
            step=int(last["step"]), validation_bits_per_byte=float(last["val_mean"]),
            tokens=spec.steps * spec.batch_size * spec.model.block_size, seconds=round(time.monotonic() - started, 1),
        )
    shutil.rmtree(work)


def _trainer(spec: ContinualSpec, work: Path, store: Store, data: StudyData) -> ContinualTrainer:
    blocks = [data.block_array("train", language) for language in spec.languages]
    lengths = {language: len(own) for language, own in zip(spec.languages, blocks, strict=True)}
    order = schedule(spec.sampler, lengths, steps=spec.steps, batch_size=spec.batch_size, seed=spec.seed)
    if spec.method == "replay":
        order = with_replay(order, len(spec.languages), spec.strength, spec.seed)
    feed = ScheduledBlocks(order, blocks, None)
    token_bytes = vocabulary_bytes(data.tokenizer)
    validation: Sequence[ValidationSet] = [
        ValidationSet(language, runs._validation_ids(data, language, spec), token_bytes) for language in spec.languages
    ]
    if spec.start is None:
        model = build_model(spec.model, spec.seed)
    else:
        model = load_gpt2(store.require(runs.STAGE, spec.start, notebook="06_forgetting_curves"))
    return ContinualTrainer(spec, feed, validation, work, model.train())
