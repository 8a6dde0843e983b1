"""The inference settings of the study and their scores: which experts answer, and how their answers combine.

An ablation of a mixture needs no training: all settings are views of the same experts (arXiv 2407.19610, part
on inference). Here every expert runs once on each window, and all settings derive from the experts' logits.

One rule serves all variants, because averaging means the same in all: the mean of logits. Where experts
share a linear output projection (JEET, MoE-CE) the mean of the last hidden states *is* the mean of the
logits. Where each has a head of its own (PLE) hidden states cannot be mixed, and averaged log-probabilities,
renormalised to a distribution (the normalised geometric mean), are again the softmax of the mean logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.evaluation import WindowBatch, add_up, score_rows, window_batches
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_config import COMMON, MomeConfig
from mome_utils.routing import TokenRouter

__all__ = [
    "Setting", "pair_partner", "score_settings", "setting_logits", "setting_parameters", "setting_weights", "settings",
]

#: Targets whose logits are held at once: small enough for a processor's cache.
CHUNK = 64


@dataclass(frozen=True)
class Setting:
    """Which experts answer at inference.

    Attributes:
        name: unique among the settings of a model.
        experts: languages whose experts take part, in the model's order; none for the common expert alone.
        routed: one of ``experts`` is chosen for each sequence; otherwise all of them answer, averaged.
        common: the common expert is averaged with their answer.
        oracle: the route is the document's true language instead of the router's choice.
    """

    name: str
    experts: tuple[str, ...]
    routed: bool = False
    common: bool = False
    oracle: bool = False

    @property
    def mixtures(self) -> tuple[tuple[str, ...], ...]:
        """The groups of experts whose mean answers: one group, or one per possible route."""
        shared = (COMMON,) if self.common else ()
        if self.routed:
            return tuple((name, *shared) for name in self.experts)
        return ((*self.experts, *shared),)


def pair_partner(languages: Sequence[str]) -> str:
    """The language that pairs are formed with: ``py`` as published, or the last where there is no ``py``."""
    return "py" if "py" in languages else languages[-1]


def settings(config: MomeConfig, *, oracle: bool = False) -> tuple[Setting, ...]:
    """The settings that a variant allows; with four languages the published 21 (MoE-CE) and 12 (PLE, JEET).

    For n languages: all routed; each alone; every pair with `pair_partner`, routed and averaged; all
    averaged; and with a common expert also all routed, each alone and every routed pair averaged with it,
    and the common expert alone. Two languages form no pair other than all of them, so pairs are left out
    there.

    Args:
        config: of the model.
        oracle: add the routed settings over all experts once more with the documents' true languages.
    """
    languages = tuple(config.languages)
    partner = pair_partner(languages)
    pairs = [tuple(sorted((a, partner), key=languages.index)) for a in languages if a != partner]
    pairs = pairs if len(languages) > 2 else []
    plain = [
        Setting("routed", languages, routed=True),
        *(Setting(f"{name} alone", (name,)) for name in languages),
        *(Setting(f"{a}+{b} routed", (a, b), routed=True) for a, b in pairs),
        *(Setting(f"{a}+{b} averaged", (a, b)) for a, b in pairs),
        Setting("all averaged", languages),
    ]
    found = list(plain)
    if config.variant == "moe_ce":
        found += [
            Setting(f"{s.name}, with common", s.experts, s.routed, common=True)
            for s in plain if s.routed or len(s.experts) == 1
        ]
        found.append(Setting("common alone", (), common=True))
    if oracle:
        found += [
            Setting(f"{s.name}, true language", s.experts, True, s.common, oracle=True)
            for s in found if s.routed and s.experts == languages
        ]
    return tuple(found)


def setting_logits(
    logits: Mapping[str, Tensor], setting: Setting, routes: Tensor | None = None
) -> Tensor:
    """Logits of one setting from those of the single experts.

    Args:
        logits: by expert name (languages, and ``common``), each [B, T, V]. In PLE they come from each
            expert's own head, elsewhere from the shared projection.
        setting: what to combine.
        routes: for a routed setting, the index into ``setting.experts`` of each sequence, [B].

    Returns:
        [B, T, V]; their softmax is the setting's distribution.
    """
    mixed = [torch.stack([logits[name] for name in group]).mean(0) for group in setting.mixtures]
    if not setting.routed:
        return mixed[0]
    if routes is None:
        raise MomeError(f"The setting '{setting.name}' needs a route for each sequence: pass routes.")
    return torch.stack(mixed)[routes, torch.arange(len(routes), device=routes.device)]


def setting_weights(languages: Sequence[str], setting: Setting, routes: Tensor) -> Tensor:
    """A setting as weights of the experts, so that the model itself answers in it: ``model(ids, expert_weights=…)``.

    Args:
        languages: the model's, in its order.
        setting: what to combine.
        routes: for a routed setting, the index into ``setting.experts`` of each sequence, [B]; else only B counts.

    Returns:
        [B, experts + 1] float32, the common expert last; each row adds up to 1.
    """
    columns = {name: i for i, name in enumerate((*languages, COMMON))}
    table = torch.zeros(len(setting.mixtures), len(columns))
    for row, group in zip(table, setting.mixtures, strict=True):
        row[[columns[name] for name in group]] = 1 / len(group)
    return table[routes if setting.routed else torch.zeros(len(routes), dtype=torch.long)]


def setting_parameters(model: MomeForCausalLM, setting: Setting) -> dict[str, int]:
    """Parameters that a setting needs: ``total`` in memory, and ``active`` for one sequence.

    Experts that it never asks count in neither. The router's table is left out: it holds counts, and no setting's
    answer is computed with it.
    """
    routed = sum(p.numel() for p in model.experts.parameters())
    common = sum(p.numel() for p in model.common.parameters()) if model.common is not None else 0
    shared = sum(p.numel() for p in model.parameters()) - routed - common
    fixed, one = shared + common * setting.common, routed // len(model.experts)
    asked = 1 if setting.routed else len(setting.experts)
    return {"total": fixed + one * len(setting.experts), "active": fixed + one * asked}


@torch.inference_mode()
def score_settings(
    model: MomeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    block_size: int,
    stride: int,
    router: TokenRouter | None = None,
    oracle: bool = True,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Loss of each document under every setting, from one pass of every expert.

    Each window of a document is routed by itself, from the tokens that the model reads there; a pair is
    routed by the larger of the pair's two router scores. Windows and scored targets are those of
    `evaluation.score_documents`, which gives the same numbers for a model with fixed routes.

    Args:
        model: any variant, in evaluation mode, on any device.
        tokenizer: the study's.
        documents: each scored alone, in windows of ``block_size`` tokens that start ``stride`` apart.
        router: by default the model's own.
        oracle: also score the routed settings with the documents' true languages (needs an expert for each).

    Returns:
        Long rows: setting, language, document, nats, bytes, tokens.

    Raises:
        MomeError: no fitted router, one of other languages, or a document of a language without an expert.
    """
    chosen = settings(model.config, oracle=oracle)
    router = _checked_router(model, router)
    strangers = sorted({d.language for d in documents} - set(model.languages))
    if oracle and strangers:
        unknown = ', '.join(strangers)
        raise MomeError(f"No expert knows {unknown}: leave those documents out, or pass oracle=False.")
    known = {name: i for i, name in enumerate(model.languages)}
    truth = torch.tensor([known.get(d.language, 0) for d in documents])
    totals = {setting.name: np.zeros(len(documents)) for setting in chosen}
    tokens = np.zeros(len(documents), dtype=np.int64)
    groups = tuple(dict.fromkeys(chain.from_iterable(setting.mixtures for setting in chosen)))
    for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
        logprobs = _group_logprobs(model, batch, groups)
        scores = router(batch.ids.to(model.device), batch.mask.to(model.device)).cpu()
        np.add.at(tokens, batch.target_owners.numpy(), 1)
        for setting in chosen:
            stacked = torch.stack([logprobs[group] for group in setting.mixtures])
            routes = torch.zeros(len(batch.ids), dtype=torch.long)
            if setting.oracle:
                routes = truth[batch.owners]
            elif setting.routed:
                routes = scores[:, [known[name] for name in setting.experts]].argmax(-1)
            picked = stacked[routes[batch.rows], torch.arange(stacked.shape[1])]
            add_up(totals[setting.name], batch, picked)
    rows = [score_rows(documents, totals[s.name], tokens).assign(setting=s.name) for s in chosen]
    table = pd.concat(rows, ignore_index=True)
    return table[["setting", *table.columns.drop("setting")]]


def _checked_router(model: MomeForCausalLM, router: TokenRouter | None) -> TokenRouter:
    """The router to use, on the model's device."""
    if router is None:
        if not model.config.router_fitted:
            raise MomeError("This model has no fitted router: call set_router first, or pass router=.")
        return model.router
    if tuple(router.languages) != model.languages:
        raise MomeError(
            f"The router knows {', '.join(router.languages)} but the experts are "
            f"{', '.join(model.languages)}: "
            "fit the router again for the experts' languages, in their order."
        )
    return router.to(model.device)


def _group_logprobs(
    model: MomeForCausalLM, batch: WindowBatch, groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], Tensor]:
    """Log-probability in nats of each scored target, [S] on the CPU, under the mean logits of each group."""
    device = model.device
    names = list(dict.fromkeys(chain.from_iterable(groups)))
    members = [[names.index(name) for name in group] for group in groups]
    ids, rows, columns = (t.to(device) for t in (batch.ids, batch.rows, batch.columns))
    hidden = [model.expert_hidden(name, ids)[rows, columns] for name in names]
    targets = batch.targets.to(device)
    found = []
    for first in range(0, len(targets), CHUNK):
        part = slice(first, first + CHUNK)
        heads = [model.head(name)(states[part]).float() for name, states in zip(names, hidden, strict=True)]
        logits = torch.stack(heads, dim=1)
        chosen = logits.gather(2, targets[part, None, None].expand(-1, len(names), 1))[..., 0]
        of_groups = torch.stack([chosen[:, group].mean(1) for group in members])
        found.append(of_groups - _normalizers(logits, members))
    return dict(zip(groups, torch.cat(found, dim=1).cpu(), strict=True))


def _normalizers(logits: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """``logsumexp`` of the mean logits of each group, [groups, S], from all experts' logits, [S, experts, V].

    Most groups hold one or two experts, and exp of a mean of two is a product of roots. So one exponential
    per expert and one small matrix product serve them all; they are exact as long as no two experts' best
    tokens lie more than 150 nats deep in each other's distribution.
    """
    top = logits.amax(-1, keepdim=True)
    roots = ((logits - top) / 2).exp_()
    pairs = (roots @ roots.mT).log_() + (top + top.mT) / 2
    return torch.stack([
        pairs[:, group[0], group[-1]] if len(group) <= 2 else logits[:, group].mean(1).logsumexp(-1)
        for group in members
    ])
