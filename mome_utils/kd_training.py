"""Distillation on ``transformers.Trainer``: cross-entropy and a distance from a cached teacher, weighed by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mome_utils.alpha import Signals, make_alpha
from mome_utils.config import MomeError
from mome_utils.distillation import Objective, micro_losses
from mome_utils.training import LMTrainer, model_logits

__all__ = ["KDTrainer"]


class KDTrainer(LMTrainer):
    """Distillation: α·CE + β·distance from a teacher whose last hidden states come with the batch.

    The teacher's logits are rebuilt by one product with its output matrix ``head`` ``[V, H]``. The rule for α is
    asked once for each micro-batch, in order; a loss that it does not need is not computed. ``records`` holds per
    step the means over micro-batches of ``ce``, ``kd`` (nats), ``alpha`` and the minimised ``loss``, and where
    there are several micro-batches also ``ce_i``, ``kd_i`` and ``alpha_i`` of each.
    """

    def __init__(self, *args: Any, head: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.spec.objective is None:
            raise MomeError("A distillation run needs an objective: give one, or train without a teacher.")
        self.objective: Objective = self.spec.objective
        self.rule = make_alpha(self.objective.alpha, self.objective.value, self.spec.steps)
        self.head = head

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, step, parts = inputs["input_ids"], self.state.global_step, self.objective.micro_batches
        needs = [self.rule.needs(step, part) for part in range(parts)]
        logits = model_logits(model, ids, inputs["languages"])
        teacher = self._teacher_logits(inputs["teacher_states"], [kd for _, kd in needs])
        ce, kd = micro_losses(self.objective, logits, teacher, ids, needs, pad=self.spec.model.eos)
        norms = self._gradient_norms(logits, ce, kd) if self.rule.needs_norms else None
        values = torch.stack([ce, kd]).detach().tolist()  # one read of the device
        rows, weights = [], []
        for part, (ce_needed, kd_needed) in enumerate(needs):
            signals = Signals(
                step, self.spec.steps, part, parts,
                ce=values[0][part] if ce_needed else float("nan"),
                kd=values[1][part] if kd_needed else float("nan"),
                **({} if norms is None else {"ce_norm": norms[0][part], "kd_norm": norms[1][part]}),
            )
            weights.append(self.rule.weights(signals))
            rows.append({"ce": signals.ce, "kd": signals.kd, "alpha": weights[-1][0]})
        alpha, beta = torch.tensor(weights, dtype=ce.dtype, device=ce.device).T
        loss = (alpha * ce + beta * kd).mean()
        self._record(rows, sum(a * c + b * k for (a, b), c, k in zip(weights, *values, strict=True)) / parts)
        return (loss, logits) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, states: Tensor, wanted: list[bool]) -> Tensor | None:
        """Logits [K, T, V] of the sequences whose micro-batches are wanted, in the states' own type.

        The states' last position predicts a token beyond the block: it is dropped by the losses.
        """
        if not any(wanted):
            return None
        if not all(wanted):
            states = states.unflatten(0, (len(wanted), -1))[wanted].flatten(0, 1)
        return states @ self.head.to(states).T

    def _gradient_norms(self, logits: Tensor, ce: Tensor, kd: Tensor) -> list[list[float]]:
        """Euclidean norms of each micro-batch's two gradients in the logits, [2][m]."""
        found = []
        for losses in (ce, kd):
            (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
            found.append(gradient.float().unflatten(0, (len(losses), -1)).flatten(1).norm(dim=1))
        norms: list[list[float]] = torch.stack(found).tolist()
        return norms

    def _record(self, rows: list[dict[str, float]], loss: float) -> None:
        """One row of the history: means over the micro-batches that computed a loss, and each one's own values."""
        means: dict[str, float] = {"loss": loss}
        for name in ("ce", "kd", "alpha"):
            known = [row[name] for row in rows if row[name] == row[name]]
            means[name] = sum(known) / len(known) if known else float("nan")
        if len(rows) > 1:
            means |= {f"{name}_{i}": value for i, row in enumerate(rows) for name, value in row.items()}
        self.record(**means)

    def state_to_keep(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def restore_state(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state)
