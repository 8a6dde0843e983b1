"""What a mixture of experts has to beat: the same experts in an ensemble, or averaged into one model.

The experts of PLE are ordinary language models, so two older ways to use several models at once apply to them:

*Soft ensemble* (Branch-Train-Merge, Li et al. 2022, arXiv 2208.03306): the experts' next-token distributions are
averaged with weights that say how probable each expert's domain is. Here the weights are the router's calibrated
probabilities of the window, cut to the largest few and scaled to 1. The mean is that of probabilities: a token needs
the support of one expert only (an inference setting that is *averaged* takes the geometric mean instead).

*Model soup* (Wortsman et al. 2022, arXiv 2203.05482): the experts' weights are averaged, parameter by parameter, and
one model of one expert's size is left. It works where the models lie in one basin of the loss, as fine-tuned copies
of a model do.

Windows, scored targets and rows are those of :mod:`mome_utils.evaluation` and :mod:`mome_utils.moe_settings`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.evaluation import WindowBatch, add_up, score_rows, window_batches
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_settings import CHUNK
from mome_utils.routing import TokenRouter

__all__ = [
    "ORACLE", "ROUTED", "Scorer", "causal", "causal_logprobs", "expert_scorers", "score_ensembles", "score_soup",
    "soft_name", "soft_probabilities", "soup", "top_weights",
]

#: Windows → log-probability in nats of each of their scored targets, [S] on the CPU.
Scorer = Callable[[WindowBatch], Tensor]

#: Names of the settings in the rows of :func:`score_ensembles`, as in :mod:`mome_utils.moe_settings`.
ROUTED, ORACLE = "routed", "routed, true language"


def soft_name(top: int) -> str:
    """Name of the soft ensemble of the ``top`` most probable experts in the rows of :func:`score_ensembles`."""
    return f"soft top-{top}"


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of an ordinary causal language model on ids [B, T]; with ``partial``, a function to time."""
    device = next(model.parameters()).device
    # Embedded here: given ids, transformers would warn of unmasked padding at every </s>, also the padding token.
    embeddings = model.get_input_embeddings()(ids.to(device))  # type: ignore[operator]
    logits: Tensor = model(inputs_embeds=embeddings, use_cache=False).logits
    return logits


def causal_logprobs(model: GPT2LMHeadModel, batch: WindowBatch) -> Tensor:
    """Log-probability in nats of each scored target under a GPT-2, [S] on the CPU."""
    embeddings = model.transformer.wte(batch.ids.to(model.device))  # see `causal`
    hidden = model.transformer(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return _picked_logprobs(hidden, model.lm_head, batch)


def _expert_logprobs(model: MomeForCausalLM, name: str, batch: WindowBatch) -> Tensor:
    """Log-probability in nats of each scored target under one expert of a mixture, [S] on the CPU."""
    hidden = model.expert_hidden(name, batch.ids.to(model.device))
    return _picked_logprobs(hidden, model.head(name), batch)


def _picked_logprobs(hidden: Tensor, head: nn.Module, batch: WindowBatch) -> Tensor:
    """[S] from hidden states [B, T, D]: only the scored positions are projected, few at a time to stay in the cache."""
    device = hidden.device
    picked, targets = hidden[batch.rows.to(device), batch.columns.to(device)], batch.targets.to(device)
    found = []
    for states, wanted in zip(picked.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = head(states).float()
        found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found).cpu()


def expert_scorers(model: MomeForCausalLM) -> dict[str, Scorer]:
    """Each expert of a mixture by itself, for :func:`score_ensembles`."""
    return {name: partial(_expert_logprobs, model, name) for name in model.languages}


@torch.inference_mode()
def score_ensembles(
    experts: Mapping[str, Scorer],
    router: TokenRouter,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    top: int = 2,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Loss of each document when experts are routed hard, routed by its true language, or mixed softly.

    Each window is routed by itself. Every different expert runs once on each window.

    Args:
        experts: for each of the router's languages, what scores windows: ``expert_scorers(mixture)``, or
            ``partial(causal_logprobs, model)`` for each. One function may serve several languages (an expert of two
            languages): it then runs once, and has both languages' probability.
        router: calibrated for good weights (:func:`mome_utils.router_fit.calibrate`).
        tokenizer: the study's.
        documents: each scored alone, in windows of ``block_size`` tokens that start ``stride`` apart.
        top: how many languages the soft ensemble keeps.

    Returns:
        Long rows: setting (`ROUTED`, `ORACLE`, `soft_name(top)`), language, document, nats, bytes, tokens.

    Raises:
        MomeError: a language of the router or of a document without an expert, or ``top`` outside the experts.
    """
    missing = sorted(({d.language for d in documents} | set(router.languages)) - set(experts))
    if missing:
        raise MomeError(f"No expert answers for {', '.join(missing)}: give one for each language.")
    if not 1 <= top <= len(router.languages):
        raise MomeError(f"A soft ensemble of {len(router.languages)} languages keeps 1 to all of them, not {top}.")
    order = {name: i for i, name in enumerate(router.languages)}
    truth = torch.tensor([order[d.language] for d in documents])
    functions = list({id(experts[name]): experts[name] for name in order}.values())
    serves = torch.tensor([next(i for i, f in enumerate(functions) if f is experts[name]) for name in order])
    totals = {name: np.zeros(len(documents)) for name in (ROUTED, ORACLE, soft_name(top))}
    tokens = np.zeros(len(documents), dtype=np.int64)
    for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
        np.add.at(tokens, batch.target_owners.numpy(), 1)
        logprobs = torch.stack([function(batch) for function in functions])[serves]
        device = router.bias.device
        probabilities = router.probabilities(batch.ids.to(device), batch.mask.to(device)).cpu()
        every = torch.arange(logprobs.shape[1])
        for name, routes in ((ROUTED, probabilities.argmax(-1)), (ORACLE, truth[batch.owners])):
            add_up(totals[name], batch, logprobs[routes[batch.rows], every])
        weights = top_weights(probabilities, top)[batch.rows].T.log()  # [L, S]; -inf leaves an expert out
        add_up(totals[soft_name(top)], batch, (weights + logprobs).logsumexp(0))
    rows = [score_rows(documents, nats, tokens).assign(setting=name) for name, nats in totals.items()]
    table = pd.concat(rows, ignore_index=True)
    return table[["setting", *table.columns.drop("setting")]]


def top_weights(probabilities: Tensor, top: int) -> Tensor:
    """The ``top`` largest of each row [B, L], scaled to add up to 1; 0 elsewhere."""
    values, places = probabilities.topk(top, dim=-1)
    return torch.zeros_like(probabilities).scatter_(-1, places, values / values.sum(-1, keepdim=True))


@torch.inference_mode()
def soft_probabilities(model: MomeForCausalLM, ids: Tensor, top: int = 2) -> Tensor:
    """Next-token probabilities of the soft ensemble of a mixture's experts; with ``partial``, a function to time.

    The router reads the same ids, and an expert runs only on the sequences that it has a weight for. As in
    :func:`score_ensembles` it is probabilities that are averaged; ``model(ids, expert_weights=…)`` would average
    log-probabilities.

    Args:
        model: with a fitted, calibrated router. MoE-CE's common expert takes no part.
        ids: token ids, [B, T].
        top: how many experts each sequence keeps.

    Returns:
        [B, T, V] float32; each position adds up to 1.

    Raises:
        MomeError: ``top`` outside the experts, or no fitted router.
    """
    if not 1 <= top <= len(model.languages):
        raise MomeError(f"A soft ensemble of {len(model.languages)} experts keeps 1 to all of them, not {top}.")
    ids = ids.to(model.device)
    weights = top_weights(model.router_probabilities(ids), top).float()
    mixed = torch.zeros(*ids.shape, model.config.vocab_size, device=ids.device)
    for index in weights.any(0).nonzero().flatten().tolist():
        rows, name = weights[:, index].nonzero().flatten(), model.languages[index]
        answer = model.head(name)(model.expert_hidden(name, ids[rows])).float().softmax(-1)
        mixed.index_add_(0, rows, answer.mul_(weights[rows, index, None, None]))
    return mixed


def soup(model: MomeForCausalLM) -> MomeForCausalLM:
    """A copy of a mixture in which every expert is the uniform average of all its experts' weights.

    Whatever the route, the answer is the same: it stands for one model of one expert's size. What is shared (and a
    common expert) stays as it is.
    """
    mixed = copy.deepcopy(model)
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in mixed.state_dict().items():
        if name.startswith("experts."):
            parts[name.split(".", 2)[2]].append(tensor)
    for tensors in parts.values():
        mean = torch.stack(tensors).mean(0)
        for tensor in tensors:
            tensor.copy_(mean)
    return mixed


@torch.inference_mode()
def score_soup(
    model: MomeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
) -> pd.DataFrame:
    """Loss of each document under the :func:`soup` of a mixture's experts: rows as of :func:`score_ensembles`."""
    one = expert_scorers(soup(model))[model.languages[0]]
    totals, tokens = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    for batch in window_batches(tokenizer, documents, block_size, stride):
        add_up(totals, batch, one(batch))
        np.add.at(tokens, batch.target_owners.numpy(), 1)
    rows = score_rows(documents, totals, tokens).assign(setting="soup")
    return rows[["setting", *rows.columns.drop("setting")]]
