"""Forgetting: what a model loses of earlier languages while it learns later ones.

Everything derives from one matrix, R[i, j]: bits per byte on language j after stage i, with the languages in
the order in which they are learned. Lower is better, unlike the accuracies of the sources, so signs turn
where that keeps a metric's meaning: *forgetting* is positive when something was lost, *transfer* is positive
when something was won.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.evaluation import WindowBatch, add_up, score_rows, window_batches
from mome_utils.intervals import Interval, Measure, crossed_interval, cube
from mome_utils.models import shifted_ce
from mome_utils.moe import MomeForCausalLM

__all__ = [
    "METRICS", "ForgettingError", "Metric", "Order", "average_performance", "backward_transfer",
    "first_language_forgetting", "forgetting", "forgetting_by_language", "forward_transfer",
    "gradient_cosines", "metric_interval", "metric_table", "r_matrix", "rise_since_best", "score_growing",
    "stage_bands",
]  # fmt: skip

Order = Sequence[str] | Mapping[int, Sequence[str]]


class ForgettingError(MomeError):
    """Scores that do not make a matrix of stages and languages; the message says what is missing."""


def average_performance(scores: np.ndarray) -> np.ndarray:
    """Mean over languages after the last stage, R [..., T, L] -> [...]; lower is better.

    Lopez-Paz & Ranzato 2017, equation 2 (ACC): 1/L Σ_j R[T, j].
    """
    return np.asarray(scores[..., -1, :].mean(-1))


def backward_transfer(scores: np.ndarray) -> np.ndarray:
    """What later stages did to languages already learned, R [..., T, T] -> [...]; positive: they helped.

    Lopez-Paz & Ranzato 2017, equation 3 (BWT): 1/(T-1) Σ_{i<T} (R[i, i] - R[T, i]), the sign turned for bits.
    """
    _square(scores)
    learned = np.diagonal(scores, axis1=-2, axis2=-1)
    return np.asarray((learned - scores[..., -1, :])[..., :-1].mean(-1))


def forward_transfer(scores: np.ndarray, untrained: np.ndarray) -> np.ndarray:
    """How far a language is before its own stage, R [..., T, T] and b [..., T] -> [...]; positive: ahead.

    Lopez-Paz & Ranzato 2017, equation 4 (FWT): 1/(T-1) Σ_{i>1} (b[i] - R[i-1, i]) against the untrained
    model's scores b, the sign turned for bits.
    """
    _square(scores)
    before = np.diagonal(scores, offset=1, axis1=-2, axis2=-1)
    return np.asarray((untrained[..., 1:] - before).mean(-1))


def forgetting_by_language(scores: np.ndarray) -> np.ndarray:
    """Final score minus the best after an earlier stage, R [..., T, L] -> [..., L]; positive: forgotten.

    Chaudhry et al. 2018, equation 3: f_j = max_{l<T} a[l, j] - a[T, j] in accuracies; in bits
    R[T, j] - min_{l<T} R[l, j]. A negative value says that the language is at its best at the end.
    """
    if scores.shape[-2] < 2:
        raise ForgettingError("Forgetting compares stages: give at least two.")
    return np.asarray(scores[..., -1, :] - scores[..., :-1, :].min(-2))


def forgetting(scores: np.ndarray) -> np.ndarray:
    """Mean of `forgetting_by_language` over all languages but the last one learned, R [..., T, T] -> [...].

    Chaudhry et al. 2018: F = 1/(T-1) Σ_{j<T} f_j.
    """
    _square(scores)
    return np.asarray(forgetting_by_language(scores)[..., :-1].mean(-1))


def first_language_forgetting(scores: np.ndarray) -> np.ndarray:
    """`forgetting_by_language` of the language learned first, R [..., T, L] -> [...]."""
    return forgetting_by_language(scores)[..., 0]


def rise_since_best(scores: np.ndarray) -> np.ndarray:
    """Mean of `forgetting_by_language` over all languages, R [..., T, L] -> [...], for a single session.

    The rows are then points in time and not stages; every language could have been best before the last one.
    """
    return np.asarray(forgetting_by_language(scores).mean(-1))


@dataclass(frozen=True)
class Metric:
    """A number derived from R [..., T, T] -> [...], its definition, source, and which direction is better."""

    name: str
    definition: str
    source: str
    better: str
    function: Callable[[np.ndarray], np.ndarray]


_LPR = "Lopez-Paz & Ranzato 2017"
_CHAUDHRY = "Chaudhry et al. 2018"

#: Metrics of a matrix of stages by languages, by name (forward transfer also needs the untrained model).
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(
                "average performance",
                "mean over languages after the last stage",
                f"{_LPR}, ACC",
                "lower",
                average_performance,
            ),
            Metric(
                "forgetting",
                "final minus best earlier score, mean over all languages but the last",
                f"{_CHAUDHRY}, F",
                "lower",
                forgetting,
            ),
            Metric(
                "forgetting of the first language",
                "final minus best earlier score of the language learned first",
                f"{_CHAUDHRY}, f of language 1",
                "lower",
                first_language_forgetting,
            ),
            Metric(
                "backward transfer",
                "score right after a language's own stage minus final score, mean over all but the last",
                f"{_LPR}, BWT",
                "higher",
                backward_transfer,
            ),
        )
    }
)


def r_matrix(
    rows: pd.DataFrame,
    order: Sequence[str],
    *,
    stages: Sequence[int] | None = None,
    measure: Measure = "bits_per_byte",
) -> np.ndarray:
    """R[stage, language] as the mean over seeds, [stages, len(order)].

    Args:
        rows: long format with `stage` (1 after the first stage; 0, if there, is the untrained model),
            `language`, `document`, `nats`, `bytes`, `tokens` and, with several seeds, `seed`.
        order: the languages, column by column, in the order of learning.
        stages: the rows of R; by default 1 to len(order).
    """
    chosen = list(range(1, len(order) + 1)) if stages is None else list(stages)
    losses, sizes = cube(_tasks(rows, order, chosen), ["stage", "task"], measure)
    scores = (losses.sum(1) / sizes.sum(1)).mean(0)
    return np.asarray(scores.reshape(len(chosen), len(order)))


def metric_interval(
    rows: pd.DataFrame,
    order: Order,
    metric: Callable[[np.ndarray], np.ndarray],
    *,
    stages: Sequence[int] | None = None,
    measure: Measure = "bits_per_byte",
    draws: int = 2000,
) -> Interval:
    """Interval of a metric of R over seeds and documents (crossed, see `intervals`).

    Args:
        rows: as in `r_matrix`; every seed must hold every stage and language.
        order: one order for all seeds, or seed -> its own order (columns of R are then places in that order).
        metric: R [..., stages, languages] -> [...], recomputed whole in every draw.
    """
    first = next(iter(order.values())) if isinstance(order, Mapping) else order
    chosen = list(range(1, len(first) + 1)) if stages is None else list(stages)
    shape = (len(chosen), len(first))

    def statistic(cells: np.ndarray) -> np.ndarray:
        return metric(cells.reshape(*cells.shape[:-1], *shape))

    selected = _tasks(rows, order, chosen)
    return crossed_interval(selected, ["stage", "task"], statistic, measure=measure, draws=draws)


def metric_table(
    arms: Mapping[str, pd.DataFrame], order: Order, metrics: Mapping[str, Metric] = METRICS
) -> pd.DataFrame:
    """Every metric of every arm: arm, metric, estimate, low, high, better, definition, source."""
    rows = []
    for arm, scores in arms.items():
        for metric in metrics.values():
            found = metric_interval(scores, order, metric.function)
            rows.append(
                {
                    "arm": arm,
                    "metric": metric.name,
                    "estimate": found.estimate,
                    "low": found.low,
                    "high": found.high,
                    "better": metric.better,
                    "definition": metric.definition,
                    "source": metric.source,
                }
            )
    return pd.DataFrame(rows)


def stage_bands(order: Sequence[str], ends: Sequence[int]) -> list[tuple[int, int, str]]:
    """(first step, last step, language) of each stage, from the steps at which the stages end."""
    if len(order) != len(ends) or list(ends) != sorted(set(ends)) or not ends or ends[0] <= 0:
        raise ForgettingError(f"{len(order)} languages need as many increasing stage ends, not {list(ends)}.")
    starts = [0, *ends[:-1]]
    return list(zip(starts, ends, order, strict=True))


def score_growing(
    model: MomeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Losses of a mixture that grows by one expert per stage, in the order of its languages.

    After stage k only the first k experts exist, and none of them changes any more. Each window of a document
    is routed by itself, as in `moe_settings.score_settings`: the last stage is that function's routed score.

    Args:
        model: the finished mixture, in evaluation mode, with a fitted router.
        block_size, stride: of `evaluation.windows`.

    Returns:
        Long rows with `routes` and `stage` (1 to the number of experts). Routes "router": the largest of the
        first k scores of the router. Routes "oracle": the document's own expert once it exists, the router's
        choice before that.
    """
    count = len(model.languages)
    places = {language: i for i, language in enumerate(model.languages)}
    own = torch.tensor([places[document.language] for document in documents])
    cells = [(kind, stage) for kind in ("oracle", "router") for stage in range(1, count + 1)]
    totals = {cell: np.zeros(len(documents)) for cell in cells}
    tokens = np.zeros(len(documents), dtype=np.int64)
    with torch.inference_mode():
        for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
            logprobs = torch.stack([_expert_logprobs(model, name, batch) for name in model.languages])
            ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
            scores, truth = model.router(ids, mask).cpu(), own[batch.owners]
            np.add.at(tokens, batch.target_owners.numpy(), 1)
            for kind, stage in cells:
                routes = scores[:, :stage].argmax(-1)
                if kind == "oracle":
                    routes = torch.where(truth < stage, truth, routes)
                picked = logprobs[routes[batch.rows], torch.arange(logprobs.shape[1])]
                add_up(totals[kind, stage], batch, picked)
    tables = [score_rows(documents, totals[c], tokens).assign(routes=c[0], stage=c[1]) for c in cells]
    return pd.concat(tables, ignore_index=True)


def _expert_logprobs(model: MomeForCausalLM, name: str, batch: WindowBatch, chunk: int = 256) -> Tensor:
    """Log-probability in nats of each scored target under one expert, [S] float32 on the CPU."""
    hidden = model.expert_hidden(name, batch.ids.to(model.device))
    picked = hidden[batch.rows.to(model.device), batch.columns.to(model.device)]
    head, found = model.head(name), []
    for states, targets in zip(picked.split(chunk), batch.targets.to(model.device).split(chunk), strict=True):
        logits = head(states).float()
        found.append(logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found).cpu()


def gradient_cosines(model: PreTrainedModel, batches: Mapping[str, tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """Cosines between the loss gradients of different languages at one point of training.

    A small step of size η against the gradient of b changes the loss of a by -η g_a·g_b: a negative cosine
    says that learning b unlearns a, and one near zero that learning b does nothing for a.

    Args:
        model: a causal language model; its gradients are cleared.
        batches: per language two batches of ids [B, T]. Rows of the result use the first, columns the second,
            so that the diagonal shows how far two batches of one language agree.

    Returns:
        Cosines, a data frame [languages, languages].
    """
    first = torch.stack([_gradient(model, pair[0]) for pair in batches.values()])
    second = torch.stack([_gradient(model, pair[1]) for pair in batches.values()])
    names = list(batches)
    return pd.DataFrame((first @ second.T).numpy(), index=names, columns=names)


def _gradient(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The gradient of the mean next-token loss as one unit vector, [parameters] on the CPU."""
    model.zero_grad(set_to_none=True)
    shifted_ce(model(input_ids=ids, use_cache=False).logits, ids).backward()
    flat = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat / flat.norm()


def _square(scores: np.ndarray) -> None:
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < 2:
        raise ForgettingError(
            f"This metric needs one stage per language and two or more, not a matrix {scores.shape[-2:]}."
        )


def _tasks(rows: pd.DataFrame, order: Order, stages: Sequence[int]) -> pd.DataFrame:
    """The rows of the wanted stages and languages; `task` is a language's place in its seed's order."""
    if "stage" not in rows.columns:
        raise ForgettingError("The scores have no column 'stage': score the model after every stage.")
    if isinstance(order, Mapping):
        orders = {seed: {language: i for i, language in enumerate(o)} for seed, o in order.items()}
        if "seed" not in rows.columns or not set(rows["seed"]) <= set(orders):
            raise ForgettingError("An order per seed was given, but not for every seed of the scores.")
        task = [
            orders[s].get(language, -1) for s, language in zip(rows["seed"], rows["language"], strict=True)
        ]
        languages = len(next(iter(orders.values())))
    else:
        places = {language: i for i, language in enumerate(order)}
        task = [places.get(language, -1) for language in rows["language"]]
        languages = len(places)
    chosen = rows.assign(task=task)
    chosen = chosen[(chosen["task"] >= 0) & chosen["stage"].isin(list(stages))]
    if len(chosen[["stage", "task"]].drop_duplicates()) != len(stages) * languages:
        raise ForgettingError(
            f"The scores lack some of the {len(stages)} stages by {languages} languages: score them all."
        )
    return chosen
