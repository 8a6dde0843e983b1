"""Training on ``transformers.Trainer``: what a run is, how it is fed, and the trainer of language models.

A run is a :class:`TrainSpec`, a frozen dataclass. Its whole data order is drawn beforehand from its seed
(:func:`mome_utils.schedules.schedule`), so that arms with one seed see the same sequences in the same order, and so
that a resumed run continues exactly where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import GPT2LMHeadModel, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from mome_utils.artifacts import file_digest, write_atomic
from mome_utils.batches import ScheduledBlocks, ValidationSet, model_logits
from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective
from mome_utils.distributed import averaged, check_processes, check_shards, check_share, wait
from mome_utils.fused import covers, fused_ce
from mome_utils.models import build_gpt2, shifted_ce
from mome_utils.schedules import ScheduleKind
from mome_utils.top_k import SparseCache

__all__ = [
    "LMTrainer", "ModelSpec", "TrainSpec", "build_model", "load_gpt2", "resolve_dtype", "save_model",
    "sound_checkpoint",
]

RECORDS = "records.json"


@dataclass(frozen=True)
class ModelSpec:
    """Architecture of a run's model: ``gpt2``, or the joint mixtures ``jeet`` and ``moe_ce`` (see ``moe``)."""

    kind: str
    shape: Shape
    vocab_size: int
    block_size: int
    bos: int
    eos: int
    #: Experts of a mixture, in order; empty for ``gpt2``.
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainSpec:
    """All that defines a training run, and with the sources of its modules its key.

    ``objective`` and ``teacher`` (the key of the teacher's run) are both given or both ``None`` (plain language
    modelling). ``compiled`` trains a plain GPT-2 through ``torch.compile``. ``snapshots`` are steps after which the
    weights are kept beside the final ones. ``groups`` restricts training and validation to blocks whose documents all
    belong to these topic groups; empty means all blocks.
    ``cache`` says what is kept of the teacher: its last hidden states, or, where they are not at hand, k tokens of each
    position; then ``teacher`` may be any name that a cache was stored under.
    """

    model: ModelSpec
    data: str
    languages: tuple[str, ...]
    sampler: ScheduleKind
    steps: int
    batch_size: int
    learning_rate: float
    lr_schedule: str
    warmup: float
    weight_decay: float
    seed: int
    threads: int
    dtype: str
    evaluations: int
    evaluation_blocks: int | None
    select_best: bool
    objective: Objective | None = None
    teacher: str | None = None
    compiled: bool = False
    snapshots: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    cache: SparseCache | None = None
    #: Processes that train it together, each on an equal share of every batch: sums, and so results, depend on it.
    processes: int = 1

    def __post_init__(self) -> None:
        if (self.objective is None) != (self.teacher is None):
            raise MomeError("A distillation run needs both an objective and a teacher's key, a plain run neither.")
        if self.steps % self.evaluations:
            raise MomeError(f"{self.steps} steps cannot be scored {self.evaluations} times at equal distances.")
        if self.objective is not None and self.batch_size % self.objective.micro_batches:
            raise MomeError(
                f"A batch of {self.batch_size} sequences cannot be cut into {self.objective.micro_batches} equal "
                "micro-batches: choose a number that divides it."
            )
        if self.cache is not None:
            if self.objective is None:
                raise MomeError("A run without a teacher has no use for a teacher's cache: leave the cache out.")
            self.cache.check(self.objective, self.model.vocab_size)
        parts = 1 if self.objective is None else self.objective.micro_batches
        whole = self.objective is not None and not covers(self.objective)
        check_share(self.batch_size, parts, self.processes, whole=whole, compiled=self.compiled)


def resolve_dtype(dtype: str) -> str:
    """``float32`` or ``bfloat16``: what ``auto`` means on this machine (bfloat16 where it is multiplied natively)."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def build_model(spec: ModelSpec, seed: int) -> PreTrainedModel:
    """The untrained model of a run."""
    if spec.kind == "gpt2":
        return build_gpt2(
            spec.shape, vocab_size=spec.vocab_size, block_size=spec.block_size, seed=seed, bos=spec.bos, eos=spec.eos
        )
    from mome_utils.moe import build_mome  # only mixtures depend on it, and so only their keys

    return build_mome(
        spec.kind, spec.shape, vocab_size=spec.vocab_size, block_size=spec.block_size, languages=spec.experts,
        seed=seed, bos=spec.bos, eos=spec.eos,
    )


def save_model(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write configuration and weights (safetensors), and nothing else."""
    save: Any = model.save_pretrained  # typed as a tensor in the library's stubs
    save(folder, state_dict=state_dict)


def _as_is(batch: Any) -> Any:
    """The feed makes whole batches already."""
    return batch


class _Records(TrainerCallback):
    """Keeps the per-step records with each checkpoint, and each checkpoint's hashes beside it."""

    def __init__(self, trainer: LMTrainer, progress: Path) -> None:
        self.trainer = trainer
        self.progress = progress
        self.written = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        now = time.monotonic()  # a step can be shorter than opening a file
        if now - self.written > 2 or state.global_step == state.max_steps:
            self.progress.write_text(f"{state.global_step}/{state.max_steps}", encoding="utf-8")
            self.written = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()  # each process keeps its own random state there
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = {f.name: file_digest(f) for f in sorted(folder.iterdir()) if f.name != RECORDS}
        kept = {"records": self.trainer.records, "files": files, "state": self.trainer.state_to_keep()}
        write_atomic(folder / RECORDS, json.dumps(kept))


class _Snapshots(TrainerCallback):
    """Keeps the weights after the steps that the spec names."""

    def __init__(self, trainer: LMTrainer, steps: Sequence[int]) -> None:
        self.trainer = trainer
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            weights = self.trainer.whole_weights()
            if state.is_world_process_zero:
                save_model(model, Path(args.output_dir) / "snapshots" / f"step-{state.global_step:06d}", weights)


def sound_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of an unfinished run whose files all match their recorded hashes."""
    candidates = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in candidates:
        record = checkpoint / RECORDS
        if record.is_file():
            files = json.loads(record.read_text(encoding="utf-8"))["files"]
            if all((checkpoint / n).is_file() and file_digest(checkpoint / n) == h for n, h in files.items()):
                return checkpoint
    return None


class LMTrainer(Trainer):
    """Language modelling by next-token cross-entropy on a :class:`ScheduledBlocks` feed.

    Validation is bits per byte per language; the best checkpoint (if the spec selects one) is that with the lowest
    mean over languages. ``records`` holds one row per step and per validation.
    """

    def __init__(
        self, spec: TrainSpec, feed: ScheduledBlocks, validation: Sequence[ValidationSet], folder: Path,
        model: PreTrainedModel,
    ) -> None:
        every = spec.steps // spec.evaluations
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size // spec.processes,
            learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, optim="adamw_torch_fused",
            adam_beta2=0.95,  # a short memory suits short runs
            lr_scheduler_type="cosine" if spec.lr_schedule == "cosine" else "constant_with_warmup",
            warmup_steps=max(1, round(spec.warmup * spec.steps)), bf16=spec.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(), seed=spec.seed, logging_strategy="no", report_to="none",
            eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=2,
            load_best_model_at_end=spec.select_best, metric_for_best_model="eval_loss", greater_is_better=False,
            remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True, save_only_model=False,
            log_level_replica="passive",  # the other processes of a run are as quiet as the first
            logging_nan_inf_filter=False,  # it reads the loss from the device in each step
            ddp_find_unused_parameters=spec.model.kind != "gpt2",  # a batch need not reach all experts of a mixture
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # torch's DataParallel in one process would multiply the batch
        check_processes(spec.processes, arguments.world_size)
        super().__init__(
            model=model, args=arguments, train_dataset=feed, eval_dataset=list(validation), data_collator=_as_is
        )
        # Our loss is a mean over the micro-batch, so the Trainer must average it over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.spec = spec
        self.feed = feed
        self.network: Any = model
        if self.is_fsdp_enabled:
            check_shards(spec.model.kind, self.accelerator.state.fsdp_plugin)
        # Weights stay with the model: what is compiled is one way through its decoder.
        self.decoder: Any = getattr(model, "transformer", None)
        if spec.compiled and self.decoder is not None:
            self.decoder = torch.compile(self.decoder)
        self.validation = validation
        self.records: list[dict[str, float]] = []
        self.add_callback(_Records(self, folder / "progress"))
        if spec.snapshots:
            self.add_callback(_Snapshots(self, spec.snapshots))
        self._quiet()

    def _quiet(self) -> None:
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.feed)  # the schedule is the order

    def training_step(
        self, model: Any, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward. The parent's does the same after asking, in each step, for what we never use
        (optimizers that a package may bring along, accumulation), at the cost of a tenth of a short step."""
        loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """0: nobody reads the parent's estimate, which counts all parameters anew in each step."""
        return 0

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, hidden = None, None if return_outputs else self.hidden_states(model, inputs)
        if hidden is not None:
            loss = fused_ce(hidden, self.network.lm_head.weight, inputs["input_ids"], dtype=self.product_dtype)
        else:
            logits = model_logits(model, inputs["input_ids"], inputs["languages"])
            loss = shifted_ce(logits, inputs["input_ids"])
        if model.training:
            self.record(loss=averaged(loss).item())
        return (loss, logits) if return_outputs else loss

    def hidden_states(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Last hidden states [B, T, H] of a model whose logits are one product with its ``lm_head`` away.

        ``None`` for a mixture with several output matrices, and for a model that is wrapped or in shards to be trained
        in parallel, which must be called as a whole. (Where that is cheap, as with a plain GPT-2, it is called so.)
        """
        if isinstance(model, DistributedDataParallel) and type(self.network) is GPT2LMHeadModel:
            # The logits of one position are all that this computes too much.
            found = model(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=True, logits_to_keep=1)
            whole: Tensor = found.hidden_states[-1]
            return whole
        if model is not self.network or self.is_fsdp_enabled:
            return None
        ids: Tensor = inputs["input_ids"]
        states: Tensor | None = None
        with self.accelerator.autocast():  # it wraps the whole model's forward pass only
            if type(model) is GPT2LMHeadModel:
                states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            elif model.config.model_type == "mome" and model.config.variant != "ple":
                states = model.shared_states(ids, inputs["languages"])
        return states

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the products of hidden states and output matrix."""
        return torch.bfloat16 if self.spec.dtype == "bfloat16" else torch.float32

    def record(self, **values: float) -> None:
        """Append a row for the step under way."""
        self.records.append({"step": self.state.global_step + 1, **values})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation bits per byte: per language, and their mean as ``eval_loss``."""
        self.network.eval()
        order = {language: i for i, language in enumerate(self.spec.model.experts or self.spec.languages)}
        scores = {v.language: v.bits_per_byte(self.network, order.get(v.language, 0)) for v in self.validation}
        self.network.train()
        own = [value for language, value in scores.items() if language in self.spec.languages]
        metrics = {f"eval_{language}": value for language, value in scores.items()}
        metrics["eval_loss"] = float(np.mean(own))
        self.records.append({
            "step": self.state.global_step, "val_mean": metrics["eval_loss"],
            **{f"val_{language}": value for language, value in scores.items()},
        })
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def state_to_keep(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond the Trainer's own state, as JSON values."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_to_keep` gave."""

    def restore(self, checkpoint: Path) -> None:
        """Take up the records and the state of a checkpoint before resuming from it."""
        kept = json.loads((checkpoint / RECORDS).read_text(encoding="utf-8"))
        self.records = kept["records"]
        self.restore_state(kept["state"])

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The weights of a model in shards (FSDP), collected by all processes; ``None`` where each has all of them."""
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # As in the parent, without training_args.bin: it is a pickle, and the spec already says all it holds.
        if self.args.should_save:  # it is asked in every process
            save_model(self.network, Path(output_dir or str(self.args.output_dir)), state_dict)


def load_gpt2(folder: Path) -> GPT2LMHeadModel:
    """A finished run's GPT-2 in float32."""
    return GPT2LMHeadModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
