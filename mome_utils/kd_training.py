"""Distillation on ``transformers.Trainer``: cross-entropy and a distance from a cached teacher, weighed by a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mome_utils.alpha import Signals, make_alpha
from mome_utils.config import MomeError
from mome_utils.distillation import Objective, micro_losses
from mome_utils.fused import covers, fused_losses
from mome_utils.training import LMTrainer, model_logits

__all__ = ["KDTrainer"]


class KDTrainer(LMTrainer):
    """Distillation: α·CE + β·distance from a teacher whose last hidden states come with the batch.

    The teacher's logits are rebuilt by one product with its output matrix ``head`` ``[V, H]``; where
    :mod:`mome_utils.fused` covers the objective and the model is a plain GPT-2, chunk by chunk with the losses. The
    rule for α is asked once for each micro-batch, in order; a loss that it does not need is not computed. ``records``
    holds per step the means over micro-batches of ``ce``, ``kd`` (nats), ``alpha`` and the minimised ``loss``, and
    where there are several micro-batches also ``ce_i``, ``kd_i`` and ``alpha_i`` of each.
    """

    def __init__(self, *args: Any, head: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.spec.objective is None:
            raise MomeError("A distillation run needs an objective: give one, or train without a teacher.")
        self.objective: Objective = self.spec.objective
        self.rule = make_alpha(self.objective.alpha, self.objective.value, self.spec.steps)
        self.head = head if self.feed.states is None else head.to(self.feed.states[0].dtype)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, step, parts = inputs["input_ids"], self.state.global_step, self.objective.micro_batches
        needs = [self.rule.needs(step, part) for part in range(parts)]
        fused = covers(self.objective) and not return_outputs
        hidden = self.hidden_states(model, inputs) if fused else None
        if hidden is not None:
            states = self._wanted(inputs["teacher_states"], [kd for _, kd in needs])
            unknown = [math.nan] * parts
            weights = self._weights(step, needs, unknown, unknown, ()) if not self.rule.needs_losses else partial(
                self._weights, step, needs
            )
            found = fused_losses(
                self.objective, hidden, model.lm_head.weight, states, self.head, ids, needs, weights,
                dtype=self.product_dtype, norms=self.rule.needs_norms,
            )
            self._record(needs, found.ce, found.kd, found.weights)
            return found.loss
        logits = model_logits(model, ids, inputs["languages"])
        teacher = self._teacher_logits(inputs["teacher_states"], [kd for _, kd in needs])
        ce, kd = micro_losses(self.objective, logits, teacher, ids, needs, pad=self.spec.model.eos)
        norms = self._gradient_norms(logits, ce, kd) if self.rule.needs_norms else ()
        values = torch.stack([ce, kd]).detach().tolist()  # one read of the device
        chosen = self._weights(step, needs, values[0], values[1], norms)
        alpha, beta = torch.tensor(chosen, dtype=ce.dtype, device=ce.device).T
        loss = (alpha * ce + beta * kd).mean()
        self._record(needs, values[0], values[1], chosen)
        return (loss, logits) if return_outputs else loss

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
        return None if kept is None else kept @ self.head.to(kept).T

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
