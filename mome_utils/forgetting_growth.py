"""A mixture that grows by one expert per stage: what it scores after each, and proof of what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.evaluation import WindowBatch, add_up, score_rows, window_batches
from mome_utils.moe import MomeForCausalLM
from mome_utils.router_fit import fit_router
from mome_utils.router_growth import add_language
from mome_utils.routing import TokenRouter

__all__ = ["grow_routers", "prove_growth", "score_growing"]


def grow_routers(blocks: Mapping[str, Sequence[Any]], vocab_size: int) -> tuple[TokenRouter | None, ...]:
    """The router of each stage of a mixture that grows in the mapping's order.

    With one expert there is nothing to route (``None``). The second stage fits a router on both languages; each later
    one adds a row by :func:`~mome_utils.router_growth.add_language`, from the new language's text alone.

    Args:
        blocks: token ids ``[n, T]`` of two languages or more.
        vocab_size: ``V``.
    """
    names = list(blocks)
    if len(names) < 2:
        raise MomeError("A mixture grows from two languages on: give the blocks of two or more.")
    routers: list[TokenRouter | None] = [None, fit_router({name: blocks[name] for name in names[:2]}, vocab_size)]
    for name in names[2:]:
        before = routers[-1]
        if before is not None:
            routers.append(add_language(before, name, list(blocks[name])))
    return tuple(routers)


@torch.inference_mode()
def prove_growth(experts: Mapping[str, GPT2LMHeadModel], ids: Mapping[str, Tensor]) -> pd.DataFrame:
    """Whether PLE, grown expert by expert, answers on earlier languages as before, bit for bit, under true routes.

    Args:
        experts: finished experts in the order in which they come, two or more.
        ids: sequences ``[n, T]`` of each language.

    Returns:
        A row for each new expert and each language before it: ``added``, ``language``, ``numbers`` (logits
        compared), ``equal`` (all of them the same bits as those of the expert alone, as it was in the stage before,
        and its weights the same as those given).
    """
    names = list(experts)
    complete = MomeForCausalLM.from_experts(experts).eval()
    alone = {name: complete.experts[i](input_ids=ids[name], use_cache=False).logits for i, name in enumerate(names)}
    mixture = MomeForCausalLM.from_experts({name: experts[name] for name in names[:2]}).eval()
    before = {names[0]: alone[names[0]]}
    rows = []
    for stage, added in enumerate(names[1:], start=1):
        if stage > 1:
            mixture.add_expert(added, experts[added])
        after = {
            name: mixture(input_ids=ids[name], routes=torch.full((len(ids[name]),), place)).logits
            for place, name in enumerate(names[: stage + 1])
        }
        for place, name in enumerate(names[:stage]):
            equal = torch.equal(before[name], after[name]) and torch.equal(alone[name], after[name])
            own, given = mixture.experts[place].state_dict(), experts[name].state_dict()
            same = own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in own)
            rows.append({"added": added, "language": name, "numbers": after[name].numel(), "equal": equal and same})
        before = after
    return pd.DataFrame(rows)


def score_growing(
    models: MomeForCausalLM | Sequence[MomeForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    routers: Sequence[TokenRouter | None] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Losses of a mixture that grows by one expert per stage, in the order of its languages.

    After stage k only the first k experts exist. Each window of a document is routed by itself, as in
    `moe_settings.score_settings`: with one finished model, the last stage is that function's routed score.

    Args:
        models: in evaluation mode, with a fitted router: the finished mixture, if what a stage learned never changes
            again; else the model as it was after each stage.
        block_size, stride: of `evaluation.windows`.
        routers: the router of each stage as it grew (see `grow_routers`); ``None`` sends everything to expert one.

    Returns:
        Long rows with `routes` and `stage` (1 to the number of experts). Routes "router": the largest of the
        first k scores of the last model's router. Routes "grown": the choice of the stage's own router, if routers
        are given. Routes "oracle": the document's own expert once it exists, the first of the other two kinds
        (grown, if given) before that.
    """
    by_stage = [models] * len(models.languages) if isinstance(models, MomeForCausalLM) else list(models)
    names, last = by_stage[-1].languages, by_stage[-1]
    if len(by_stage) != len(names) or (routers is not None and len(routers) != len(names)):
        raise MomeError(f"A mixture of {len(names)} experts grows in as many stages: give what each has.")
    places = {language: i for i, language in enumerate(names)}
    own = torch.tensor([places[document.language] for document in documents])
    kinds = ("oracle", "router") if routers is None else ("oracle", "router", "grown")
    cells = [(kind, stage) for kind in kinds for stage in range(1, len(names) + 1)]
    totals = {cell: np.zeros(len(documents)) for cell in cells}
    tokens = np.zeros(len(documents), dtype=np.int64)
    with torch.inference_mode():
        for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
            ids, mask = batch.ids.to(last.device), batch.mask.to(last.device)
            scores, truth = last.router(ids, mask).cpu(), own[batch.owners]
            np.add.at(tokens, batch.target_owners.numpy(), 1)
            known: dict[int, list[Tensor]] = {}
            for stage, model in enumerate(by_stage, start=1):
                found = known.setdefault(id(model), [])
                found += [_expert_logprobs(model, name, batch) for name in names[len(found) : stage]]
                routes = {"router": scores[:, :stage].argmax(-1)}
                if routers is not None:
                    router = routers[stage - 1]
                    first = torch.zeros_like(truth)
                    routes["grown"] = first if router is None else router(ids.cpu(), mask.cpu()).argmax(-1)
                routes["oracle"] = torch.where(truth < stage, truth, routes["grown" if routers else "router"])
                for kind, chosen in routes.items():
                    logprobs = torch.stack(found[:stage])
                    picked = logprobs[chosen[batch.rows], torch.arange(logprobs.shape[1])]
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
