"""The two sides of the training benchmarks: this package's trainer, and the loop of a textbook, each a process.

*The textbook* is the loop that tutorials show: a ``DataLoader`` over a list of examples, teacher and student run in
each step, both softmaxes over the whole vocabulary in float32 with ``F.kl_div`` beside the cross-entropy, ``AdamW``,
gradients clipped, a cosine schedule, and the loss read with ``.item()`` in each step. *Ours* is the trainer that the
study uses, fed with the teacher's cached hidden states. Both start from the same weights and see the same sequences
in the same order, at the same dtype, threads, batch, learning rate and weights of the two losses; the benchmarks
check that their losses agree.

A side runs in a process of its own, since what it does to memory (:func:`~mome_utils.memory.keep_freed_memory`, which
our side calls as the study does and the textbook does not) holds for a whole process. It makes itself ready, and then
takes as many steps as a line on its standard input says, answers with one line of JSON, and waits: so two sides stay
warm and can be timed in turn.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    get_cosine_schedule_with_warmup,
)

from mome_utils.alpha import Signals, make_alpha
from mome_utils.batches import ScheduledBlocks, ValidationSet
from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective
from mome_utils.kd_training import KDTrainer
from mome_utils.memory import (
    keep_freed_memory,
    peak_resident_bytes,
    release_freed_memory,
    reset_peak,
    resident_bytes,
)
from mome_utils.models import build_gpt2
from mome_utils.training import LMTrainer, ModelSpec, TrainSpec, build_model

__all__ = ["Side", "Turn", "Worker", "library_network", "textbook_loop", "train_spec"]

BOS, EOS = 1, 2
#: Steps that a side could take: its learning rate warms up within the first of them. A benchmark stops long before.
STEPS, WARMUP = 20_000, 20
#: Different sequences that a side draws its batches from.
SEQUENCES = 64


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        loop: ``ours`` or ``textbook``.
        work: ``kd``, with a teacher, or ``ce``, without.
        compiled: whether ``torch.compile`` is used: for our decoder, or for the textbook's forward passes and losses
            together.
        network: the textbook's student and teacher as ``transformers`` makes a GPT-2 (``library``), or with this
            package's settings of activation and attention (``ours``). They compute the same function.
        teacher, student: shapes.
        vocabulary, block, batch: entries, tokens of a sequence, sequences of a step.
        dtype: ``float32``, or ``bfloat16`` by autocast. threads: of torch.
        divergence: our L_KD; ``soft_ce`` has the gradient of the textbook's forward KL.
        seed: of weights and sequences.
    """

    loop: str
    work: str
    compiled: bool = False
    network: str = "library"
    teacher: Shape = Shape(4, 192, 3)
    student: Shape = Shape(2, 96, 2)
    vocabulary: int = 2048
    block: int = 128
    batch: int = 4
    dtype: str = "float32"
    threads: int = 1
    divergence: str = "soft_ce"
    seed: int = 0

    @property
    def name(self) -> str:
        """The side in words."""
        how = "compiled" if self.compiled else "eager"
        return f"{self.loop}, {how}" + ", our network" * (self.loop == "textbook" and self.network == "ours")

    def flops(self) -> float:
        """Floating-point operations of a step's matrix products: two for each multiplication and addition.

        Backward passes count as two forward passes (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B). With a
        cache, the teacher costs one product with its output matrix; embeddings cost nothing.
        """
        tokens = self.batch * self.block
        total = 3 * _forward_flops(self.student, self.vocabulary, self.block)
        if self.work == "kd":
            head = 2 * self.vocabulary * self.teacher.width
            whole = _forward_flops(self.teacher, self.vocabulary, self.block)
            total += head if self.loop == "ours" else whole
        return total * tokens


def _forward_flops(shape: Shape, vocabulary: int, block: int) -> float:
    """Of one token's forward pass: 12 · width² weights a layer, scores and mixtures over the block, the output."""
    return 2 * (shape.layers * (12 * shape.width**2 + 2 * block * shape.width) + vocabulary * shape.width)


@dataclass(frozen=True)
class Turn:
    """What a side did when told to.

    Attributes:
        seconds: that passed. cpu_seconds: that the process computed.
        losses: cross-entropy of every step in nats.
        peak: bytes resident at most in this turn, above those before training (weights and sequences).
    """

    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]
    peak: int


class Worker:
    """A side in a process of its own, kept warm. Use it in a ``with`` block: the process ends with it."""

    def __init__(self, side: Side) -> None:
        self.side = side
        environment = os.environ | {"OMP_NUM_THREADS": str(side.threads), "TOKENIZERS_PARALLELISM": "false"}
        # Both sides decide for themselves what becomes of freed memory: nothing is inherited.
        for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
            environment.pop(name, None)
        package = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8")  # a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mome_utils.bench_sides", json.dumps(asdict(side))], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def turn(self, steps: int) -> Turn:
        """Take so many steps, and say what they cost.

        Raises:
            MomeError: the process ended; with the last line that it wrote.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then the answer is empty, and the complaint says more
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._complaints.seek(0)
            lines = self._complaints.read().strip().splitlines() or ["it said nothing (want of memory?)"]
            raise MomeError(f"The process of '{self.side.name}' ended: {lines[-1]}.")
        found = json.loads(answer)
        return Turn(found["seconds"], found["cpu_seconds"], tuple(found["losses"]), found["peak"])


class _Gate:
    """Where a side stops after each step to look whether its turn is over."""

    def __init__(self, orders: TextIO, answers: TextIO) -> None:
        self.orders, self.answers = orders, answers
        self.losses: list[float] = []
        gc.collect()
        release_freed_memory()
        self.before = resident_bytes()
        self._wait()

    def _wait(self) -> None:
        order = self.orders.readline()
        if not order:
            raise SystemExit  # nobody asks any more
        self.left = int(order)
        self.losses = []
        reset_peak()
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def step(self, loss: float) -> None:
        """Called after each optimizer step with its cross-entropy."""
        self.losses.append(loss)
        self.left -= 1
        if self.left == 0:
            answer = {
                "seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.start_cpu,
                "losses": self.losses, "peak": peak_resident_bytes() - self.before,
            }
            print(json.dumps(answer), file=self.answers, flush=True)
            self._wait()


# ---------------------------------------------------------------------------------------------------- the textbook


def library_network(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A GPT-2 of the same weights as ``transformers`` makes it by default: its activation, its choice of attention."""
    own = model.config
    make: Any = GPT2Config
    config = make(
        vocab_size=own.vocab_size, n_positions=own.n_positions, n_embd=own.n_embd, n_layer=own.n_layer,
        n_head=own.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )
    plain = GPT2LMHeadModel(config)
    plain.load_state_dict(model.state_dict())
    return plain


def textbook_loop(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batches: DataLoader, spec: TrainSpec,
    after_step: Callable[[float], None], *, compiled: bool = False,
) -> None:
    """Train a student as tutorials do, with the settings of a spec of ours.

    Args:
        student, teacher: language models; without a teacher the loss is the cross-entropy alone.
        batches: of ``{"input_ids": [B, T]}``, one for each step.
        spec: steps, learning rate, warm-up, weight decay, dtype and the rule for α.
        after_step: called with the step's cross-entropy.
        compiled: put both forward passes and the losses through ``torch.compile``.
    """
    rule = None
    if spec.objective is not None:
        rule = make_alpha(spec.objective.alpha, spec.objective.value, spec.steps)

    def losses(ids: Tensor) -> tuple[Tensor, Tensor]:
        output = student(input_ids=ids, labels=ids)
        if teacher is None:
            return output.loss, output.loss
        with torch.no_grad():
            target = teacher(input_ids=ids).logits
        log_q = functional.log_softmax(output.logits[:, :-1].flatten(0, 1).float(), dim=-1)
        p = functional.softmax(target[:, :-1].flatten(0, 1).float(), dim=-1)
        distance = functional.kl_div(log_q, p, reduction="batchmean")
        return output.loss, distance

    compute: Any = torch.compile(losses) if compiled else losses
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=spec.weight_decay
    )
    rate = get_cosine_schedule_with_warmup(optimizer, max(1, round(spec.warmup * spec.steps)), spec.steps)
    student.train()
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            ce, distance = compute(batch["input_ids"])
        loss = ce
        if rule is not None:
            alpha, beta = rule.weights(Signals(step, spec.steps, ce=ce.item(), kd=distance.item()))
            loss = alpha * ce + beta * distance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        after_step(ce.item())


# -------------------------------------------------------------------------------------------------------- the sides


def train_spec(side: Side) -> TrainSpec:
    """The run that both loops take their settings from; a benchmark takes its first steps only."""
    model = ModelSpec("gpt2", side.student, side.vocabulary, side.block, bos=BOS, eos=EOS)
    with_teacher = side.work == "kd"
    return TrainSpec(
        model=model, data="benchmark", languages=("xx",), sampler="balanced", steps=STEPS, batch_size=side.batch,
        learning_rate=3e-3, lr_schedule="cosine", warmup=WARMUP / STEPS, weight_decay=0.05, seed=side.seed,
        threads=side.threads, dtype=side.dtype, evaluations=1, evaluation_blocks=1, select_best=False,
        compiled=side.loop == "ours" and side.compiled,
        objective=Objective(side.divergence, "fixed") if with_teacher else None,
        teacher="benchmark" if with_teacher else None,
    )


def _sequences(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, T], and the order [steps, B] in which batches take them."""
    drawn = np.random.default_rng(side.seed)
    ids = drawn.integers(3, side.vocabulary, (max(SEQUENCES, side.batch), side.block), dtype=np.int32)
    return ids, drawn.integers(len(ids), size=(STEPS, side.batch))


def _teacher(side: Side) -> GPT2LMHeadModel:
    """An untrained teacher: it costs what a trained one does."""
    return build_gpt2(
        side.teacher, vocab_size=side.vocabulary, block_size=side.block, seed=side.seed + 1, bos=BOS, eos=EOS
    ).eval()


def _run_textbook(side: Side, gate: Callable[[], _Gate]) -> None:
    ids, order = _sequences(side)
    spec = train_spec(side)
    models: list[Any] = [build_model(spec.model, side.seed)] + ([_teacher(side)] if side.work == "kd" else [])
    if side.network == "library":
        models = [library_network(model).train(model.training) for model in models]
    student, teacher = models if side.work == "kd" else (*models, None)
    examples: Any = [{"input_ids": torch.from_numpy(row.astype(np.int64))} for row in ids]
    batches = DataLoader(examples, batch_size=side.batch, sampler=order.flatten().tolist())
    del models
    textbook_loop(student, teacher, batches, spec, gate().step, compiled=side.compiled)


class _AfterStep(TrainerCallback):
    """Tells the gate the cross-entropy of each step."""

    def __init__(self, trainer: LMTrainer, gate: _Gate) -> None:
        self.trainer, self.gate = trainer, gate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = self.trainer.records[-1]
        self.gate.step(last.get("ce", last["loss"]))


def _run_ours(side: Side, gate: Callable[[], _Gate], folder: Path) -> None:
    keep_freed_memory()
    spec = train_spec(side)
    ids, order = _sequences(side)
    pairs = np.stack([np.zeros_like(order), order], -1)
    validation = [ValidationSet("xx", torch.from_numpy(ids[:1].astype(np.int64)), torch.ones(side.vocabulary).long())]
    model = build_model(spec.model, side.seed)
    if side.work == "ce":
        trainer = LMTrainer(spec, ScheduledBlocks(pairs, [ids], None), validation, folder, model)
    else:
        teacher = _teacher(side)
        states = _states(teacher, ids, side)
        head = teacher.lm_head.weight.detach().clone()
        del teacher
        trainer = KDTrainer(spec, ScheduledBlocks(pairs, [ids], [states]), validation, folder, model, head=head)
    trainer.add_callback(_AfterStep(trainer, gate()))
    trainer.train()


@torch.inference_mode()
def _states(teacher: GPT2LMHeadModel, ids: np.ndarray, side: Side) -> Tensor:
    """The teacher's last hidden states [n, T, H], as :func:`mome_utils.runs.cache_teacher` stores them."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=side.dtype == "bfloat16"):
        parts: Sequence[Tensor] = [
            teacher.transformer(torch.from_numpy(row[None].astype(np.int64)), use_cache=False).last_hidden_state
            for row in ids
        ]
    return torch.cat([part.bfloat16() for part in parts]).clone()


@contextlib.contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output for answers alone: what libraries print goes to the error stream."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        yield answers


def _main(description: str) -> None:
    """What a worker's process does."""
    import transformers

    transformers.logging.set_verbosity_error()
    values = json.loads(description)
    shapes = {name: Shape(**values[name]) for name in ("teacher", "student")}
    side = Side(**values | shapes)
    torch.set_num_threads(side.threads)
    with _own_output() as answers:
        if side.loop == "ours":
            with tempfile.TemporaryDirectory() as folder:
                _run_ours(side, lambda: _Gate(sys.stdin, answers), Path(folder))
        else:
            _run_textbook(side, lambda: _Gate(sys.stdin, answers))


if __name__ == "__main__":
    _main(sys.argv[1])
