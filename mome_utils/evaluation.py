"""Scoring documents with a language model: bits per byte and perplexity.

Each document is scored alone. It begins with ``<s>``, every token of its text is a target exactly once, and
``</s>`` is not scored, so with a lossless byte-level tokenizer every byte counts once and scores compare
between languages, vocabularies and models. Documents longer than the model's context are read through a
sliding window of fixed stride: how much a target sees depends on its place alone, never on what follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.intervals import LN2, Interval, IntervalError, crossed_interval, interval, paired_interval
from mome_utils.tokenization import encode

__all__ = [
    "EvaluationError",
    "Interval",
    "IntervalError",
    "WindowBatch",
    "add_up",
    "bits_per_byte",
    "crossed_interval",
    "encode_documents",
    "interval",
    "paired_interval",
    "perplexity",
    "position_logits",
    "score_documents",
    "score_rows",
    "target_logprobs",
    "window_batches",
    "windows",
]

LogitsFn = Callable[[Tensor], Tensor]
"""ids [B, T] long, right-padded → logits [B, T, V]; free to move the ids to a device of its own."""


class EvaluationError(MomeError):
    """Settings or rows that cannot be scored; the message says what to change."""


def windows(token_ids: Sequence[int], block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into overlapping windows so that every token but the first is a target exactly once.

    Args:
        token_ids: the sequence, beginning with ``<s>``; only its length matters.
        block_size: the most tokens a window holds, at least 2.
        stride: how far each window starts after the one before, 1 to block_size - 1.

    Returns:
        Tuples (start, end, first_scored): feed ``token_ids[start:end]`` and score the targets first_scored to
        end - 1, each from the logits one position before it. From the second window on, a target sees at
        least block_size - stride tokens before it. A window asks no more of a model than its training did:
        the last position of a block has no target there, and it has none here.
    """
    if block_size < 2 or not 1 <= stride < block_size:
        raise EvaluationError(
            f"A stride of {stride} does not fit blocks of {block_size}: use 1 to {block_size - 1}."
        )
    length = len(token_ids)
    found: list[tuple[int, int, int]] = []
    start, scored = 0, 1
    while scored < length:
        end = min(length, start + block_size)
        found.append((start, end, scored))
        start, scored = start + stride, end
    return found


@dataclass(frozen=True)
class WindowBatch:
    """Windows of several documents, padded on the right, and where their S scored targets are.

    ids: [B, T] long, right-padded with ``</s>`` (a causal model's earlier logits do not see the padding).
    rows, columns: [S] long; the logits that predict target s are ``logits[rows[s], columns[s]]``.
    targets: [S] long, the token ids to predict.
    owners: [B] long, the index of each window's document in the list given to `window_batches`.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    owners: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: where a window holds tokens and not padding (a window ends with its last target)."""
        ends = torch.zeros(len(self.ids), dtype=torch.long)
        ends.scatter_reduce_(0, self.rows, self.columns + 2, "amax")
        return torch.arange(self.ids.shape[1]) < ends[:, None]

    @property
    def target_owners(self) -> Tensor:
        """[S] long: the document each target belongs to."""
        return self.owners[self.rows]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[list[int]]:
    """Token ids of each document, begun with ``<s>`` and without ``</s>``."""
    encoded = encode(tokenizer, [document.text for document in documents])
    return [[int(tokenizer.bos_token_id), *ids] for ids in encoded]


def window_batches(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    block_size: int,
    stride: int,
    batch_size: int = 32,
) -> Iterator[WindowBatch]:
    """All windows of the documents in batches of similar length (longest first, so padding stays small)."""
    sequences = encode_documents(tokenizer, documents)
    pieces = [
        (owner, *window) for owner, ids in enumerate(sequences) for window in windows(ids, block_size, stride)
    ]
    pieces.sort(key=lambda piece: piece[1] - piece[2])  # start - end; equal lengths keep their order
    for first in range(0, len(pieces), batch_size):
        yield _batch(pieces[first : first + batch_size], sequences, int(tokenizer.eos_token_id))


def _batch(
    pieces: Sequence[tuple[int, int, int, int]], sequences: Sequence[list[int]], pad: int
) -> WindowBatch:
    width = max(end - start for _, start, end, _ in pieces)
    ids = torch.full((len(pieces), width), pad, dtype=torch.long)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    targets: list[Tensor] = []
    for row, (owner, start, end, scored) in enumerate(pieces):
        window = torch.tensor(sequences[owner][start:end], dtype=torch.long)
        ids[row, : end - start] = window
        columns.append(torch.arange(scored - start - 1, end - start - 1))
        rows.append(torch.full((end - scored,), row, dtype=torch.long))
        targets.append(window[scored - start :])
    owners = torch.tensor([owner for owner, *_ in pieces], dtype=torch.long)
    return WindowBatch(ids, torch.cat(rows), torch.cat(columns), torch.cat(targets), owners)


PositionLogits = Callable[[WindowBatch], Tensor]
"""WindowBatch → the logits [S, V] that predict its S targets, on the model's device."""


def position_logits(model: PreTrainedModel | LogitsFn) -> PositionLogits:
    """The logits of a causal model at scored positions; of GPT-2 only those pass the output projection.

    Args:
        model: a causal language model on any device, or a function of ids alone. Raw scores and log-probabilities
            give the same results.
    """

    def scored(batch: WindowBatch) -> Tensor:
        if not isinstance(model, PreTrainedModel):
            logits = model(batch.ids)
            return logits[batch.rows.to(logits.device), batch.columns.to(logits.device)]
        ids, rows, columns = (x.to(model.device) for x in (batch.ids, batch.rows, batch.columns))
        if isinstance(model, GPT2LMHeadModel):
            states = model.transformer(ids, use_cache=False).last_hidden_state
            return model.lm_head(states[rows, columns])
        return model(input_ids=ids, use_cache=False).logits[rows, columns]

    return scored


def target_logprobs(model: PreTrainedModel | LogitsFn, batch: WindowBatch) -> Tensor:
    """Log-probability in nats of each scored target, [S] float32 (float64 for float64 logits), on the CPU.

    Args:
        model: as in :func:`position_logits`.
    """
    logits = position_logits(model)(batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(1, batch.targets.to(logits.device)[:, None])[:, 0]
    return (chosen - logits.logsumexp(-1)).cpu()


def add_up(totals: np.ndarray, batch: WindowBatch, logprobs: Tensor) -> None:
    """Add the batch's losses in nats to `totals` [documents] float64, in place."""
    np.add.at(totals, batch.target_owners.numpy(), -logprobs.double().numpy())


def score_documents(
    model: PreTrainedModel | LogitsFn,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Loss of each document under a model.

    Args:
        model: as in :func:`position_logits`, in evaluation mode; called without gradients.
        block_size, stride: of `windows`, in tokens.

    Returns:
        One row per document, in the given order: language, document (its id), nats (float64, summed over its
        tokens), bytes (of its text in UTF-8), tokens (scored ones).
    """
    totals = np.zeros(len(documents))
    tokens = np.zeros(len(documents), dtype=np.int64)
    with torch.inference_mode():
        for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
            add_up(totals, batch, target_logprobs(model, batch))
            np.add.at(tokens, batch.target_owners.numpy(), 1)
    return score_rows(documents, totals, tokens)


def score_rows(documents: Sequence[Document], nats: np.ndarray, tokens: np.ndarray) -> pd.DataFrame:
    """The rows of `score_documents` from summed losses [documents] and token counts [documents]."""
    return pd.DataFrame(
        {
            "language": [document.language for document in documents],
            "document": [document.id for document in documents],
            "nats": np.asarray(nats, dtype=np.float64),
            "bytes": np.array([len(document.text.encode()) for document in documents], dtype=np.int64),
            "tokens": np.asarray(tokens, dtype=np.int64),
        }
    )


def bits_per_byte(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Bits per byte per language, and their unweighted mean as language "mean".

    Args:
        rows: long format of `score_documents`.
        by: further columns to group by, for example arm and seed.

    Returns:
        Columns `by`, language, bits_per_byte; within a group the languages sorted, then "mean".
    """
    return _summary(rows, by, "bits_per_byte")


def perplexity(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Perplexity per token, exp(sum nats / sum tokens), per language; their geometric mean as "mean".

    It depends on the tokenizer: compare it between models of one study, and bits per byte between studies.
    """
    return _summary(rows, by, "perplexity")


def _summary(rows: pd.DataFrame, by: Sequence[str], name: str) -> pd.DataFrame:
    sums = rows.groupby([*by, "language"], sort=True, as_index=False)[["nats", "bytes", "tokens"]].sum()
    is_bits = name == "bits_per_byte"
    sums[name] = sums["nats"] / LN2 / sums["bytes"] if is_bits else sums["nats"] / sums["tokens"]
    table = sums[[*by, "language", name]]
    if by:
        means = table.groupby(list(by), as_index=False)[name].mean().assign(language="mean")
    else:
        means = pd.DataFrame({"language": ["mean"], name: [table[name].mean()]})
    table = pd.concat([table, means], ignore_index=True)[[*by, "language", name]]
    if by:
        table = table.sort_values(list(by), kind="stable", ignore_index=True)
    return table if is_bits else table.assign(**{name: np.exp(table[name])})
