"""What a trainer reads: blocks in the order of a schedule, and validation blocks scored in bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

__all__ = ["ScheduledBlocks", "ValidationSet", "model_logits", "vocabulary_bytes"]


class ScheduledBlocks(Dataset):
    """Token blocks in the order of a schedule; a batch is one dictionary of tensors.

    Args:
        order: ``[steps, batch, 2]`` pairs (language index, block index).
        blocks: per language, token ids ``[n, T]``.
        states: per language, the teacher's last hidden states ``[n, T, H]``, or packed rows ``[n, T, w]`` of a
            :class:`~mome_utils.top_k.SparseCache`, or ``None``.
    """

    def __init__(self, order: np.ndarray, blocks: Sequence[np.ndarray], states: Sequence[Tensor] | None) -> None:
        self.order = order.reshape(-1, 2)
        self.blocks = blocks
        self.states = states

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        pairs = self.order[list(indices)]
        batch = {
            "input_ids": torch.from_numpy(np.stack([self.blocks[g][b] for g, b in pairs]).astype(np.int64)),
            "languages": torch.from_numpy(pairs[:, 0].copy()),
        }
        if self.states is not None:
            batch["teacher_states"] = torch.stack([self.states[g][b] for g, b in pairs])
        return batch


@dataclass(frozen=True)
class ValidationSet:
    """Validation blocks of one language: ids ``[n, T]``, and the bytes of each vocabulary entry ``[V]``."""

    language: str
    ids: Tensor
    token_bytes: Tensor

    @torch.inference_mode()
    def bits_per_byte(self, model: torch.nn.Module, language_index: int, batch: int = 32) -> float:
        """Bits per byte of the blocks' tokens 1…T−1 given those before; special tokens are not scored."""
        nats = torch.zeros((), dtype=torch.float64)
        size = torch.zeros((), dtype=torch.int64)
        for ids in self.ids.split(batch):
            ids = ids.to(next(model.parameters()).device)
            logits = model_logits(model, ids, torch.full((len(ids),), language_index))[:, :-1]
            bytes_ = self.token_bytes.to(ids.device)[ids[:, 1:]]
            losses = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="none"
            )
            nats += (losses * (bytes_.reshape(-1) > 0)).sum().double().cpu()
            size += bytes_.sum().cpu()
        return float(nats / np.log(2) / size)


def model_logits(model: torch.nn.Module, ids: Tensor, languages: Tensor) -> Tensor:
    """Logits ``[B, T, V]``; a mixture is given its true routes, as in the published training."""
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    if getattr(plain.config, "model_type", "") == "mome":
        return model(input_ids=ids, routes=languages.to(ids.device)).logits
    return model(input_ids=ids, use_cache=False).logits


def vocabulary_bytes(tokenizer: Any) -> Tensor:
    """Bytes that each token of a byte-level vocabulary stands for ``[V]``; 0 for special tokens."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])
