"""How well a classifier does at which positions: on copies of a sentence, at shifted positions, and where it looks.

The two measures of Ben Amor, Granitzer & Mitrović (2023, arXiv 2304.13567):

``copies``
    the sentence is written K times in a row, and each copy is scored by itself;
``shift``
    the sentence stands alone, its position ids moved by (k − 1) · length, to where the k-th copy would stand.

A special token begins every sequence; it stays at position 0 in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mome_utils.artifacts import Store
from mome_utils.config import MomeError
from mome_utils.dataset import StudyData
from mome_utils.models import IGNORED
from mome_utils.position_cures import pad_batch, shifted_positions
from mome_utils.position_models import load_classifier
from mome_utils.position_runs import STAGE, load_task
from mome_utils.position_tasks import Task
from mome_utils.runs import torch_threads
from mome_utils.sweeps import quiet
from mome_utils.tagging import Sentence, entity_spans

__all__ = ["SPAN", "attention_to_copies", "count_matches", "score_job", "score_places"]

#: What spans of all kinds are counted as.
SPAN = "span"
ANCHORS = 1


@dataclass(frozen=True)
class _Batch:
    sentences: tuple[Sentence, ...]
    tensors: Mapping[str, Tensor]
    lengths: Tensor


def _batches(
    sentences: Sequence[Sentence], copies: int, bos: int, pad: int, batch_size: int
) -> Iterator[_Batch]:
    """Sentences written ``copies`` times behind the special token; those of like length together."""
    ordered = sorted(sentences, key=len)
    for start in range(0, len(ordered), batch_size):
        part = tuple(ordered[start : start + batch_size])
        examples = [{"input_ids": [bos, *s.ids * copies], "labels": [IGNORED, *s.labels * copies]} for s in part]
        yield _Batch(part, pad_batch(examples, pad), torch.tensor([len(s) for s in part]))


def score_places(
    model: PreTrainedModel, task: Task, copies: int, *, bos: int, pad: int, max_positions: int, batch_size: int = 64
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the test sentences at each of ``copies`` places, by both measures.

    Args:
        model: a token classifier in evaluation mode.
        task: what is tested.
        copies: K.
        bos, pad: ids of the special token before a sentence, and of padding.
        max_positions: positions of the model.
        batch_size: sequences at a time.

    Returns:
        Counts: a row for each ``measure, k, document, label`` with ``tp, fp, fn`` (a label is what occurs in the test
        sentences; for spans it is :data:`SPAN`). And losses: for each ``measure, position`` the sum ``nats`` over its
        ``words``.

    Raises:
        MomeError: the copies do not fit into the model.
    """
    longest = max(len(s) for s in task.test)
    if ANCHORS + copies * longest > max_positions:
        raise MomeError(
            f"{copies} copies of {longest} tokens do not fit into {max_positions} positions: ask for fewer copies."
        )
    counts: list[pd.DataFrame] = []
    losses: dict[str, NDArray[np.float64]] = {m: np.zeros((max_positions, 2)) for m in ("copies", "shift")}
    with torch.inference_mode():
        for batch in _batches(task.test, copies, bos, pad, batch_size):
            logits = model(**_inputs(batch.tensors)).logits
            _add_losses(losses["copies"], logits, batch.tensors["labels"], batch.tensors["position_ids"])
            for k in range(copies):
                starts = (ANCHORS + k * batch.lengths).tolist()
                counts.append(_counted(task, batch.sentences, logits.argmax(-1), starts, "copies", k + 1))
        for batch in _batches(task.test, 1, bos, pad, batch_size):
            for k in range(copies):
                places = shifted_positions(batch.tensors["position_ids"], k * batch.lengths, ANCHORS)
                tensors = {**batch.tensors, "position_ids": places.clamp(max=max_positions - 1)}
                logits = model(**_inputs(tensors)).logits
                _add_losses(losses["shift"], logits, tensors["labels"], tensors["position_ids"])
                starts = [ANCHORS] * len(batch.sentences)
                counts.append(_counted(task, batch.sentences, logits.argmax(-1), starts, "shift", k + 1))
    table = pd.concat(counts, ignore_index=True)
    keys = ["measure", "k", "document", "label"]
    table = table.groupby(keys, as_index=False, sort=True)[["tp", "fp", "fn"]].sum()
    by_place = pd.concat([
        pd.DataFrame({"measure": measure, "position": range(max_positions), "nats": sums[:, 0], "words": sums[:, 1]})
        for measure, sums in losses.items()
    ], ignore_index=True)
    return table, by_place[by_place["words"] > 0].reset_index(drop=True)


def _inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids")}


def _add_losses(sums: NDArray[np.float64], logits: Tensor, labels: Tensor, places: Tensor) -> None:
    asked = labels != IGNORED
    values = functional.cross_entropy(logits[asked].float(), labels[asked], reduction="none").double().numpy()
    where = places[asked].numpy()
    np.add.at(sums[:, 0], where, values)
    np.add.at(sums[:, 1], where, 1)


def _counted(
    task: Task, sentences: Sequence[Sentence], predicted: Tensor, starts: Sequence[int], measure: str, k: int
) -> pd.DataFrame:
    """Matches of one copy of each sentence, which begins at ``starts``."""
    rows = []
    for row, (sentence, start) in enumerate(zip(sentences, starts, strict=True)):
        true = [label for label in sentence.labels if label != IGNORED]
        asked = [start + i for i, label in enumerate(sentence.labels) if label != IGNORED]
        for label, (tp, fp, fn) in count_matches(task, true, predicted[row, asked].tolist()).items():
            rows.append((measure, k, sentence.document, label, tp, fp, fn))
    return pd.DataFrame(rows, columns=["measure", "k", "document", "label", "tp", "fp", "fn"])


def count_matches(task: Task, true: Sequence[int], predicted: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """True positives, false positives and false negatives of one sentence: by label, or of whole spans.

    >>> task = Task("t", ("O", "B-X", "I-X"), True, (), ())
    >>> count_matches(task, [1, 2, 0, 1], [1, 0, 0, 1])
    {'span': (1, 1, 1)}
    """
    if task.spans:
        a, b = (entity_spans([task.labels[i] for i in labels]) for labels in (true, predicted))
        return {SPAN: (len(a & b), len(b - a), len(a - b))}
    found = np.zeros((len(task.labels), 3), dtype=int)
    for own, said in zip(true, predicted, strict=True):
        if own == said:
            found[own, 0] += 1
        else:
            found[said, 1] += 1
            found[own, 2] += 1
    return {task.labels[i]: (int(a), int(b), int(c)) for i, (a, b, c) in enumerate(found) if a + b + c}


def attention_to_copies(
    model: PreTrainedModel, task: Task, copies: int, *, bos: int, pad: int, batch_size: int = 32
) -> pd.DataFrame:
    """Where words of each copy look: the share of attention on the special token and on each copy.

    Averaged over layers, heads, sentences and the words of the copy.

    Returns:
        ``k`` (of the words that look), ``target`` (0: the special token; else a copy), ``share``; the shares of each
        ``k`` sum to 1.
    """
    sums, words = np.zeros((copies, copies + 1)), 0
    with torch.inference_mode():
        for batch in _batches(task.test, copies, bos, pad, batch_size):
            out = model(**_inputs(batch.tensors), output_attentions=True)
            weights = torch.stack(list(out.attentions)).mean((0, 2))  # [B, T, T]
            for row, n in enumerate(batch.lengths.tolist()):
                own = weights[row, ANCHORS : ANCHORS + copies * n, : ANCHORS + copies * n]
                parts = torch.cat([own[:, :ANCHORS], own[:, ANCHORS:].unflatten(1, (copies, n)).sum(2)], 1)
                sums += parts.unflatten(0, (copies, n)).sum(1).double().numpy()
                words += n
    shares = sums / words
    return pd.DataFrame([
        {"k": k + 1, "target": target, "share": shares[k, target]}
        for k in range(copies) for target in range(copies + 1)
    ])


def score_job(key: str, task: str, copies: int, threads: int, root: Path, data_folder: Path) -> list[pd.DataFrame]:
    """Counts, losses and attention of one finished run, in whatever process it lands."""
    quiet()
    store, data = Store(root), StudyData.load(data_folder)
    tokens = {"bos": data.tokenizer.bos_token_id, "pad": data.tokenizer.pad_token_id}
    with torch_threads(threads):
        model, learned = load_classifier(store.path(STAGE, key)), load_task(store, task)
        if model.config.model_type == "gpt2":
            model.set_attn_implementation("eager")  # the one that tells its weights
        counts, losses = score_places(model, learned, copies, max_positions=data.block_size, **tokens)
        looks = attention_to_copies(model, learned, copies, **tokens)
    return [counts, losses, looks]
