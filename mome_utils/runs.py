"""The run store: train once, load ever after; and the teacher's cached states.

``train_or_load`` is the heart of the study. A finished run loads, a half-finished one goes on from its last sound
checkpoint, a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mome_utils.artifacts import (
    DamagedArtifact,
    MissingArtifact,
    Store,
    digest,
    file_digest,
    read_manifest,
    source_digest,
)
from mome_utils.batches import ScheduledBlocks, ValidationSet, vocabulary_bytes
from mome_utils.config import MomeError
from mome_utils.dataset import StudyData
from mome_utils.distributed import check_processes, is_main, main_first, processes, wait
from mome_utils.kd_training import KDTrainer
from mome_utils.run_log import RunLog
from mome_utils.schedules import schedule
from mome_utils.top_k import SparseCache, SparseHead, checked, encode, pack
from mome_utils.training import LMTrainer, TrainSpec, build_model, load_gpt2, save_model, sound_checkpoint

__all__ = [
    "SPARSE", "STAGE", "STATES", "Run", "Source", "cache_folder", "cache_sparse", "cache_teacher", "run_key",
    "sparse_key", "states_key", "store_sparse", "teacher_states", "train_or_load",
]

STAGE = "runs"
STATES = "teacher_states"
SPARSE = "teacher_top_k"

Source = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
"""A teacher of any kind: ids [b, T] → its logits [b, T, V], or what :func:`mome_utils.top_k.checked` takes."""


def run_modules(spec: TrainSpec) -> tuple[str, ...]:
    """Modules whose source defines a run's numbers, and so is part of its key."""
    names = ["models", "schedules", "batches", "fused", "distributed", "training", "runs"]
    if spec.objective is not None:
        names += ["divergences", "alpha", "alpha_schedules", "distillation", "kd_training"]
    if spec.model.kind != "gpt2":
        names += ["moe", "moe_config", "moe_dispatch", "routing"]
    if spec.cache is not None:
        names.append("top_k")
    return tuple(f"mome_utils.{name}" for name in names)


def run_key(spec: TrainSpec) -> str:
    """Name of a run: its spec (which names data and teacher) and the sources that define its numbers."""
    return digest({"spec": spec, "sources": [source_digest(m) for m in run_modules(spec)]})


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    spec: TrainSpec
    key: str
    folder: Path

    def model(self, step: int | None = None) -> PreTrainedModel:
        """The model in evaluation mode, float32: the chosen checkpoint, or the snapshot after ``step``."""
        folder = self.folder if step is None else self.folder / "snapshots" / f"step-{step:06d}"
        if self.spec.model.kind == "gpt2":
            return load_gpt2(folder).eval()
        from mome_utils.moe import MomeForCausalLM

        return MomeForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def history(self) -> pd.DataFrame:
        """One row per step: ``step, loss`` (``ce, kd, alpha`` for distillation) and, where the run was validated,
        ``val_<language>`` and ``val_mean`` in bits per byte."""
        return pd.read_parquet(self.folder / "history.parquet")

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """What the manifest records: best step, validation bits per byte, tokens, seconds of training."""
        return read_manifest(self.folder).metrics


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with ``count`` threads: sums, and so results, depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def states_key(teacher: str, data: str, language: str) -> str:
    """Name of a teacher's cached states for one language."""
    return digest({"teacher": teacher, "data": data, "language": language})


def cache_teacher(store: Store, data: StudyData, teacher: Run, language: str, *, batch: int = 32) -> Path:
    """Store the teacher's last hidden states ``[n, T, H]`` (bfloat16) of a language's training blocks.

    The teacher's full-vocabulary logits are one product away (its output matrix), so nothing is lost but the
    rounding to bfloat16; block ``i`` of the cache is block ``i`` of the data. Damaged caches are made again.
    """
    key = states_key(teacher.key, data.fingerprint, language)
    with contextlib.suppress(DamagedArtifact):
        if (folder := store.load(STATES, key)) is not None:
            return folder
    blocks = data.block_array("train", language)
    with torch_threads(teacher.spec.threads), torch.inference_mode():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder = load_gpt2(teacher.folder).transformer.eval()
        torch.nn.Module.to(decoder, device)
        states = torch.empty((len(blocks), data.block_size, decoder.config.n_embd), dtype=torch.bfloat16)
        bfloat16 = teacher.spec.dtype == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            for start in range(0, len(blocks), batch):
                ids = torch.from_numpy(blocks[start : start + batch].astype(np.int64)).to(device)
                states[start : start + batch] = decoder(ids, use_cache=False).last_hidden_state.cpu()
    inputs = {"teacher": file_digest(teacher.folder / "manifest.json"), "data": data.fingerprint}
    parameters = {"teacher": teacher.key, "data": data.fingerprint, "language": language}
    with store.create(STATES, key, inputs=inputs, parameters=parameters, modules=["mome_utils.models"]) as result:
        save_file({"states": states}, result.folder / "states.safetensors")
    return store.path(STATES, key)


def teacher_states(store: Store, data: StudyData, teacher: Run, language: str) -> Tensor:
    """The cached last hidden states ``[n, T, H]`` (bfloat16) of a language's training blocks.

    Raises:
        MissingArtifact: they have not been cached yet (notebook 02 does it).
    """
    key = states_key(teacher.key, data.fingerprint, language)
    return load_file(store.require(STATES, key, notebook="02_teacher_training") / "states.safetensors")["states"]


def sparse_key(teacher: str, data: str, language: str, cache: SparseCache) -> str:
    """Name of a teacher's sparse cache for one language; both top-k kinds share it."""
    return digest({
        "teacher": teacher, "data": data, "language": language, "stored": cache.stored, "k": cache.k,
        "source": source_digest("mome_utils.top_k"),
    })


def store_sparse(
    store: Store, data: StudyData, teacher: str, language: str, cache: SparseCache, source: Source, *, batch: int = 8
) -> Path:
    """Store k tokens of each position of a language's training blocks, of a teacher that is no run of the study.

    Block ``i`` of the cache is block ``i`` of the data, position ``t`` the distribution of token ``t + 1``. A student
    is trained from it by a spec with this ``cache`` and ``teacher``. Damaged caches are made again.

    Args:
        teacher: a name for it, which must change with the teacher.
        source: gives the logits, or the tokens and log-probabilities, of ``batch`` blocks at a time.
    Raises:
        MomeError: what ``source`` gives does not fit the vocabulary, the blocks or the cache; nothing is stored.
    """
    vocabulary, key = len(data.tokenizer), sparse_key(teacher, data.fingerprint, language, cache)
    with contextlib.suppress(DamagedArtifact):
        if (folder := store.load(SPARSE, key)) is not None:
            return folder
    blocks = data.block_array("train", language)
    found: list[Mapping[str, Tensor]] = []
    for start in range(0, len(blocks), batch):
        ids = torch.from_numpy(blocks[start : start + batch].astype(np.int64))
        given = source(ids)
        if isinstance(given, Tensor):
            if given.shape != (*ids.shape, vocabulary):
                raise MomeError(
                    f"The teacher's logits {tuple(given.shape)} do not fit blocks {tuple(ids.shape)} and a vocabulary "
                    f"of {vocabulary}: use a teacher with the same tokenizer."
                )
            seed = torch.Generator(given.device).manual_seed(int(digest([key, start]), 16) >> 1)
            given = encode(given, cache, seed)
        parts = checked(given, cache, vocabulary)
        if parts["indices"].shape[:-1] != ids.shape:
            raise MomeError(
                f"The teacher gave tokens for positions {tuple(parts['indices'].shape[:-1])} of blocks "
                f"{tuple(ids.shape)}: give them for every position."
            )
        found.append({name: part.cpu() for name, part in parts.items()})
    parameters = {
        "teacher": teacher, "data": data.fingerprint, "language": language, "vocabulary": vocabulary,
        "stored": cache.stored, "k": cache.k,
    }
    inputs = {"teacher": teacher, "data": data.fingerprint}
    rows = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    with store.create(SPARSE, key, inputs=inputs, parameters=parameters, modules=["mome_utils.top_k"]) as result:
        save_file(rows, result.folder / "rows.safetensors")
    return store.path(SPARSE, key)


def cache_sparse(store: Store, data: StudyData, teacher: Run, language: str, cache: SparseCache) -> Path:
    """:func:`store_sparse` of a teacher of the study, to compare with its hidden states."""
    model: list[torch.nn.Module] = []

    def logits(ids: Tensor) -> Tensor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not model:  # a finished cache needs no teacher
            model.append(load_gpt2(teacher.folder).eval().to(device))
        bfloat16 = teacher.spec.dtype == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            given: Tensor = model[0](ids.to(device), use_cache=False).logits
        return given

    with torch_threads(teacher.spec.threads), torch.inference_mode():
        return store_sparse(store, data, teacher.key, language, cache, logits)


def cache_folder(store: Store, teacher: str, data: str, language: str, cache: SparseCache | None) -> Path:
    """Where a teacher's cache for one language lies: its states, or the k tokens that ``cache`` says.

    Raises:
        MissingArtifact: it has not been made yet.
    """
    if cache is None:
        return store.require(STATES, states_key(teacher, data, language), notebook="02_teacher_training")
    folder = store.load(SPARSE, sparse_key(teacher, data, language, cache))
    if folder is None:
        raise MissingArtifact(
            f"The teacher's {cache.kind} cache of {cache.k} tokens for {language} is not there yet: make it with "
            "mome_utils.runs.cache_sparse or store_sparse."
        )
    return folder


def _teacher_rows(store: Store, spec: TrainSpec, language: str) -> Tensor:
    """What a distillation run is fed of its teacher: hidden states [n, T, H], or packed rows [n, T, w]."""
    folder = cache_folder(store, str(spec.teacher), spec.data, language, spec.cache)
    if spec.cache is None:
        return load_file(folder / "states.safetensors")["states"]
    size = read_manifest(folder).parameters["vocabulary"]
    if size != spec.model.vocab_size:
        raise MomeError(
            f"The teacher's cache has a vocabulary of {size}, the student one of {spec.model.vocab_size}: give both "
            "the same tokenizer."
        )
    return pack(load_file(folder / "rows.safetensors"))


def train_or_load(spec: TrainSpec, store: Store, data: StudyData) -> Run:
    """The finished run of ``spec``: loaded, resumed or trained.

    A run of several processes is trained by calling this in all of them; the main one writes.

    Raises:
        MissingArtifact: the teacher the spec names has not been trained.
        MomeError: the run is to be trained, by another number of processes.
    """
    key = run_key(spec)
    with main_first():
        try:
            if (folder := store.load(STAGE, key)) is not None:
                return Run(spec, key, folder)
        except DamagedArtifact:
            shutil.rmtree(store.path(STAGE, key))  # a damaged run is made again
    check_processes(spec.processes, processes())
    work = store.root / STAGE / f"{key}.unfinished"
    with torch_threads(spec.threads), RunLog(work, f"seed {spec.seed}, {spec.dtype}, threads: {spec.threads}") as log:
        _train(spec, key, store, data, log)
    return Run(spec, key, store.path(STAGE, key))


def _train(spec: TrainSpec, key: str, store: Store, data: StudyData, log: RunLog) -> None:
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
    history = _history(trainer.records)
    validated = history.dropna(subset=["val_mean"])
    best = validated.loc[validated["val_mean"].idxmin()] if spec.select_best else validated.iloc[-1]
    inputs = {"data": spec.data} | ({"teacher": spec.teacher} if spec.teacher else {})
    weights = trainer.whole_weights()
    wait()  # every process has read the chosen checkpoint
    with main_first():
        if not is_main():
            return
        with store.create(STAGE, key, inputs=inputs, parameters=spec, modules=run_modules(spec)) as result:
            save_model(trainer.network, result.folder, weights)
            log.keep(result.folder)
            history.to_parquet(result.folder / "history.parquet", index=False)
            if (work / "snapshots").is_dir():
                shutil.copytree(work / "snapshots", result.folder / "snapshots")
            result.metrics.update(
                step=int(best["step"]), validation_bits_per_byte=float(best["val_mean"]),
                tokens=spec.steps * spec.batch_size * spec.model.block_size,
                seconds=round(time.monotonic() - started, 1),
            )
        shutil.rmtree(work)


def _trainer(spec: TrainSpec, work: Path, store: Store, data: StudyData) -> LMTrainer:
    chosen = [_chosen(data, "train", language, spec.groups) for language in spec.languages]
    blocks = [data.block_array("train", language)[c] for language, c in zip(spec.languages, chosen, strict=True)]
    lengths = {language: len(b) for language, b in zip(spec.languages, blocks, strict=True)}
    order = schedule(spec.sampler, lengths, steps=spec.steps, batch_size=spec.batch_size, seed=spec.seed)
    token_bytes = vocabulary_bytes(data.tokenizer)
    validation = [
        ValidationSet(language, _validation_ids(data, language, spec), token_bytes) for language in spec.languages
    ]
    model = build_model(spec.model, spec.seed)
    if spec.teacher is None:
        return LMTrainer(spec, ScheduledBlocks(order, blocks, None), validation, work, model)
    states = [_teacher_rows(store, spec, g)[places] for g, places in zip(spec.languages, chosen, strict=True)]
    head = SparseHead(spec.cache, spec.model.vocab_size) if spec.cache is not None else _output_matrix(
        store.require(STAGE, spec.teacher, notebook="02_teacher_training")
    )
    return KDTrainer(spec, ScheduledBlocks(order, blocks, states), validation, work, model, head=head)


def _chosen(data: StudyData, split: str, language: str, groups: Sequence[str]) -> slice | np.ndarray:
    """Which blocks of a split belong to the topic groups: all (without a copy), or their indices."""
    return data.blocks_of_groups(split, language, groups) if groups else slice(None)


def _output_matrix(teacher: Path) -> Tensor:
    """The teacher's output matrix ``[V, H]`` (tied: its embedding)."""
    return load_gpt2(teacher).lm_head.weight.detach()


def _validation_ids(data: StudyData, language: str, spec: TrainSpec) -> Tensor:
    """Validation blocks spread evenly over the split (and the spec's groups): all, or as many as the spec says."""
    blocks = data.block_array("validation", language)[_chosen(data, "validation", language, spec.groups)]
    limit = spec.evaluation_blocks
    if limit is not None and len(blocks) > limit:
        blocks = blocks[np.linspace(0, len(blocks) - 1, limit).round().astype(int)]
    return torch.from_numpy(np.asarray(blocks).astype(np.int64))


def _history(records: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Training and validation rows joined on the step."""
    table = pd.DataFrame(list(records))
    return table.groupby("step", as_index=False).first()
