"""Distillation on ``transformers.Trainer``: cross-entropy and a distance from a cached teacher, weighed by a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mome_utils.alpha import Signals, make_alpha
from mome_utils.batches import model_logits
from mome_utils.config import MomeError
from mome_utils.distillation import Objective, micro_losses
from mome_utils.distributed import Share
from mome_utils.fused import Head, covers, fused_losses
from mome_utils.training import LMTrainer

__all__ = ["KDTrainer"]


class KDTrainer(LMTrainer):
    """Distillation: α·CE + β·distance from a teacher whose last hidden states come with the batch.

    The teacher's logits are rebuilt by one product with its output matrix ``head`` ``[V, H]``; where
    :mod:`mome_utils.fused` covers the objective and the model is a plain GPT-2, chunk by chunk with the losses.
    Where the batch brings rows of another cache, ``head`` is the function that makes logits of them. The rule for α is
    asked once for each micro-batch, in order; a loss that it does not need is not computed. ``records`` holds per step
    the means over micro-batches of ``ce``, ``kd`` (nats), ``alpha`` and the minimised ``loss``, and where there are
    several micro-batches also ``ce_i``, ``kd_i`` and ``alpha_i`` of each.
    """

    def __init__(self, *args: Any, head: Head, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.spec.objective is None:
            raise MomeError("A distillation run needs an objective: give one, or train without a teacher.")
        self.objective: Objective = self.spec.objective
        self.rule = make_alpha(self.objective.alpha, self.objective.value, self.spec.steps)
        states = self.feed.states
        if isinstance(head, Tensor) and states is not None:
            head = head.to(self.args.device, states[0].dtype)
        self.head: Head = head
        self.share = Share(self.objective.micro_batches, self.args.world_size, self.args.process_index)
        mine = self.share.mine
        self.own = replace(self.objective, micro_batches=mine.stop - mine.start)  # of this process's micro-batches

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, step, mine = inputs["input_ids"], self.state.global_step, self.share.mine
        everyone = [self.rule.needs(step, part) for part in range(self.objective.micro_batches)]
        needs = everyone[mine]
        weigh = partial(self._weigh, step, everyone, ids.device)
        fused = covers(self.objective) and not return_outputs
        hidden = self.hidden_states(model, inputs) if fused else None
        if hidden is not None:
            states = self._wanted(inputs["teacher_states"], [kd for _, kd in needs])
            known = None
            if not self.rule.needs_losses:
                unknown = [math.nan] * len(everyone)
                known = self._weights(step, everyone, unknown, unknown, ())
            found = fused_losses(
                self.own, hidden, self.network.lm_head.weight, states, self.head, ids, needs,
                weigh if known is None else known[mine], dtype=self.product_dtype, norms=self.rule.needs_norms,
            )
            if known is not None:
                ce_of_all, kd_of_all = self.share.whole([found.ce, found.kd], ids.device)
                self._record(everyone, ce_of_all, kd_of_all, known)
            return found.loss
        logits = model_logits(model, ids, inputs["languages"])
        teacher = self._teacher_logits(inputs["teacher_states"], [kd for _, kd in needs])
        ce, kd = micro_losses(self.own, logits, teacher, ids, needs, pad=self.spec.model.eos)
        norms = self._gradient_norms(logits, ce, kd) if self.rule.needs_norms else ()
        values = torch.stack([ce, kd]).detach().tolist()  # one read of the device
        alpha, beta = torch.tensor(weigh(values[0], values[1], norms), dtype=ce.dtype, device=ce.device).T
        loss = (alpha * ce + beta * kd).mean()
        return (loss, logits) if return_outputs else loss

    def _weigh(
        self, step: int, needs: Sequence[tuple[bool, bool]], device: torch.device, ce: Sequence[float],
        kd: Sequence[float], norms: Sequence[Sequence[float]],
    ) -> list[tuple[float, float]]:
        """(α, β) of this process's micro-batches from their losses, by the rule that sees those of all; and the row."""
        if self.share.processes > 1:
            # The gradient of a mean over k processes' parts is 1 / k of each part's: its squared norm, Σ (norm / k)².
            squares = [[norm**2 / self.share.holders for norm in side] for side in zip(*norms, strict=True)]
            ce, kd, *squared = self.share.whole([ce, kd, *squares], device)
            norms = [[math.sqrt(value) for value in pair] for pair in zip(*squared, strict=True)]
        chosen = self._weights(step, needs, ce, kd, norms)
        self._record(needs, ce, kd, chosen)
        return chosen[self.share.mine]

    def _weights(
        self, step: int, needs: Sequence[tuple[bool, bool]], ce: Sequence[float], kd: Sequence[float],
        norms: Sequence[Sequence[float]],
    ) -> list[tuple[float, float]]:
        """(α, β) of each micro-batch: the rule, asked in order."""
        return [
            self.rule.weights(Signals(
                step, self.spec.steps, part, len(needs),
                ce=ce[part] if ce_needed else math.nan, kd=kd[part] if kd_needed else math.nan,
                **({"ce_norm": norms[part][0], "kd_norm": norms[part][1]} if self.rule.needs_norms else {}),
            ))
            for part, (ce_needed, kd_needed) in enumerate(needs)
        ]

    def _wanted(self, states: Tensor, wanted: list[bool]) -> Tensor | None:
        """The teacher's states [K, T, D] of the sequences whose micro-batches are wanted."""
        if not any(wanted):
            return None
        return states if all(wanted) else states.unflatten(0, (len(wanted), -1))[wanted].flatten(0, 1)

    @torch.no_grad()
    def _teacher_logits(self, states: Tensor, wanted: list[bool]) -> Tensor | None:
        """Logits [K, T, V] of the sequences whose micro-batches are wanted, in the states' own type.

        The states' last position predicts a token beyond the block: it is dropped by the losses.
        """
        kept = self._wanted(states, wanted)
        if kept is None:
            return None
        return kept @ self.head.to(kept).T if isinstance(self.head, Tensor) else self.head(kept)

    def _gradient_norms(self, logits: Tensor, ce: Tensor, kd: Tensor) -> list[list[float]]:
        """Euclidean norms of each micro-batch's two gradients in the logits, [m][2]."""
        found = []
        for losses in (ce, kd):
            (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
            found.append(gradient.float().unflatten(0, (len(losses), -1)).flatten(1).norm(dim=1))
        norms: list[list[float]] = torch.stack(found, 1).tolist()
        return norms

    def _record(
        self, needs: Sequence[tuple[bool, bool]], ce: Sequence[float], kd: Sequence[float],
        weights: Sequence[tuple[float, float]],
    ) -> None:
        """One row of the history: means over the micro-batches that computed a loss, and each one's own values."""
        rows = [
            {"ce": c if with_ce else math.nan, "kd": k if with_kd else math.nan, "alpha": alpha}
            for (with_ce, with_kd), c, k, (alpha, _) in zip(needs, ce, kd, weights, strict=True)
        ]
        loss = sum(a * c + b * k for (a, b), c, k in zip(weights, ce, kd, strict=True)) / len(rows)
        means: dict[str, float] = {"loss": loss}
        for name in ("ce", "kd", "alpha"):
            known = [row[name] for row in rows if row[name] == row[name]]
            means[name] = sum(known) / len(known) if known else math.nan
        if len(rows) > 1:
            means |= {f"{name}_{i}": value for i, row in enumerate(rows) for name, value in row.items()}
        self.record(**means)

    def state_to_keep(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def restore_state(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state)
