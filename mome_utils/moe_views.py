"""Looking into a mixture: what each expert writes, token by token losses, and what short prompts cost.

Nothing here trains or keeps anything: small looks for the notebook, by the model's own rules (:mod:`mome_utils.moe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, set_seed

from mome_utils.config import MomeError
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_config import COMMON

__all__ = [
    "DOCUMENT", "WINDOWS", "Voice", "continuations", "coverage_curve", "expert_voices",
    "misrouted_losses", "prompt_losses", "prompt_panel", "switching_document", "token_losses",
]

#: Names of the two ways to route a document in :func:`token_losses`.
DOCUMENT, WINDOWS = "routed once", "routed per window"


@dataclass(frozen=True)
class Voice:
    """Who continues a prompt: a mixture that routes (``expert=None``), or one of its experts alone."""

    model: MomeForCausalLM
    expert: str | None = None

    def weights(self) -> Tensor | None:
        """[1, experts + 1] that give this expert all the weight; None where the router decides."""
        if self.expert is None:
            return None
        row = torch.zeros(1, len(self.model.languages) + 1)
        row[0, [*self.model.languages, COMMON].index(self.expert)] = 1
        return row


def expert_voices(model: MomeForCausalLM, name: str) -> dict[str, Voice]:
    """Each expert of a mixture alone, the common one where there is one, and the mixture itself as ``name``."""
    alone = [*model.languages, *([COMMON] if model.common is not None else [])]
    return {f"{expert} alone": Voice(model, expert) for expert in alone} | {name: Voice(model)}


def continuations(
    voices: Mapping[str, Voice],
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> dict[str, str]:
    """What each voice writes after a prompt, sampled with the same random numbers.

    Args:
        voices: by name.
        prompt: begun with ``<s>``; its end is kept where it is too long for the models' context.
        max_new_tokens: at most.
        temperature: 0 always takes the most probable token. top_k: how many tokens are drawn from.
        seed: of the draws.

    Returns:
        By name, the new text without the prompt.

    Raises:
        MomeError: an empty prompt, or no room for new tokens.
    """
    coded = tokenizer(prompt)["input_ids"]
    if not coded:
        raise MomeError("The prompt is empty: give it a few words.")
    written = {}
    for name, voice in voices.items():
        room = voice.model.config.max_position_embeddings - max_new_tokens - 1
        if room < 1:
            raise MomeError(f"The context has no room for {max_new_tokens} new tokens: ask for fewer.")
        ids = torch.tensor([[int(tokenizer.bos_token_id), *coded[-room:]]], device=voice.model.device)
        weights = voice.weights()
        chosen = {} if weights is None else {"expert_weights": weights.to(ids.device)}
        options: dict[str, Any] = {"do_sample": False, **chosen}
        if temperature:
            options |= {"do_sample": True, "temperature": temperature, "top_k": top_k}
        set_seed(seed)
        out = voice.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
        )
        written[name] = str(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
    return written


def prompt_panel(
    model: MomeForCausalLM, name: str, tokenizer: PreTrainedTokenizerFast, prompt: str, **options: Any
) -> tuple[str, str, dict[str, str]]:
    """What a mixture called ``name`` and each of its experts write after a prompt: title, prompt and texts.

    The title says where the router sends the prompt. ``options`` are those of :func:`continuations`.
    """
    written = continuations(expert_voices(model, name), tokenizer, prompt, **options)
    ids = torch.tensor([[int(tokenizer.bos_token_id), *tokenizer(prompt)["input_ids"]]], device=model.device)
    route = int(model.route(ids)[0])
    return f"{name}, routed to {model.languages[route] if route >= 0 else 'the fallback'}", prompt, written


def switching_document(blocks: Mapping[str, np.ndarray], length: int) -> tuple[Tensor, list[str]]:
    """A text that changes its language: equal shares of the first block [T] of each, one after the other.

    Args:
        blocks: language → token ids [n, T], in the order wanted.
        length: tokens of the whole, at least one per language.

    Returns:
        Token ids [at most length] (a multiple of the number of languages), and the language of each.
    """
    share = length // len(blocks)
    if share < 1:
        raise MomeError(f"A document of {length} tokens cannot hold {len(blocks)} languages: make it longer.")
    ids = np.concatenate([rows[0][:share] for rows in blocks.values()])
    return torch.from_numpy(ids.astype(np.int64)), [language for language in blocks for _ in range(share)]


@torch.inference_mode()
def token_losses(
    model: MomeForCausalLM, ids: Tensor, *, every: int = 16, window: int = 32
) -> tuple[pd.DataFrame, list[str]]:
    """Loss of each token of one text under each expert, and under the mixture that routes once or again and again.

    Routing again is done in the manner of ``generate(reroute_every=…, reroute_window=…)``, but with the most probable
    expert however sure the router is: the tokens ``every·k`` to ``every·(k+1)-1`` are predicted by the expert that it
    chooses for the ``window`` tokens before them; the first of them are the prompt, and routed by themselves. Routing
    once uses the whole text, as scoring does.

    Args:
        model: PLE or JEET, or MoE-CE (whose experts answer with the common one, as trained), with a fitted router.
        ids: [T], at least two tokens and at most the context.

    Returns:
        Long rows (position 1 … T−1, voice, nats): voices are the languages of the model, `DOCUMENT` and `WINDOWS`;
        and for each of these positions the expert that routing again chose.
    """
    losses = {}
    for index, name in enumerate(model.languages):
        logits = model(ids[None], routes=torch.tensor([index])).logits[0, :-1].float()
        losses[name] = -logits.log_softmax(-1).gather(1, ids[1:, None].to(logits.device))[:, 0].cpu().numpy()
    stack = np.stack(list(losses.values()))
    positions = np.arange(1, len(ids))
    starts = positions // every * every
    lone = {int(s): ids[None, max(0, s - window) : s] if s else ids[None, :every] for s in np.unique(starts)}
    chosen = {start: int(model.router_probabilities(text)[0].argmax()) for start, text in lone.items()}
    routes = np.array([chosen[int(start)] for start in starts])
    losses[DOCUMENT] = stack[int(model.router_probabilities(ids[None])[0].argmax())]
    losses[WINDOWS] = stack[routes, np.arange(len(positions))]
    rows = [pd.DataFrame({"position": positions, "voice": name, "nats": nats}) for name, nats in losses.items()]
    return pd.concat(rows, ignore_index=True), [model.languages[i] for i in routes]


@torch.inference_mode()
def prompt_losses(model: MomeForCausalLM, blocks: Mapping[str, np.ndarray], length: int) -> pd.DataFrame:
    """What comes after a short prompt: loss with the route that the prompt suggests, and with the fallback.

    Args:
        model: with a fitted, calibrated router; whether it abstains does not matter here.
        blocks: language → token ids [n, T]. The first ``length`` tokens are the prompt.

    Returns:
        One row per block: language, length, probability (of the most probable expert), right (whether it is the
        language's), routed and fallback (nats per token after the prompt).

    Raises:
        MomeError: a prompt that leaves nothing to predict.
    """
    rows = []
    for language, block in blocks.items():
        if not 0 < length < block.shape[1]:
            raise MomeError(f"A prompt of {length} tokens leaves nothing of a block of {block.shape[1]} tokens.")
        ids = torch.from_numpy(block.astype(np.int64)).to(model.device)
        sure, routes = model.router_probabilities(ids[:, :length]).max(-1)
        found = {"routed": routes, "fallback": torch.full_like(routes, -1)}
        # The router sees the prompt only, also where the fallback depends on its probabilities.
        weights = {name: model.mixing_weights(ids[:, :length], routes=r) for name, r in found.items()}
        nats = {name: _after(model, ids, w, length) for name, w in weights.items()}
        right = routes.cpu().numpy() == model.languages.index(language)
        rows.append(pd.DataFrame(
            {"language": language, "length": length, "probability": sure.cpu().numpy(), "right": right} | nats
        ))
    return pd.concat(rows, ignore_index=True)


@torch.inference_mode()
def misrouted_losses(model: MomeForCausalLM, blocks: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """What a wrong route costs where there is one: blocks sent to another language's expert, and their two losses.

    Args:
        model: with a fitted router; the most probable expert counts, however sure the router is. MoE-CE's experts
            answer with the common one, as trained.
        blocks: language → token ids [n, T]. The router reads the whole block.

    Returns:
        One row per misrouted block, none where every route is right: language, expert (the one chosen), routed and
        right (nats per token under the chosen and under the language's own expert).
    """
    rows = [pd.DataFrame(columns=["language", "expert", "routed", "right"]).astype({"routed": float, "right": float})]
    for language, block in blocks.items():
        ids = torch.from_numpy(block.astype(np.int64)).to(model.device)
        routes, home = model.router_probabilities(ids).argmax(-1), model.languages.index(language)
        ids, routes = ids[routes != home], routes[routes != home]
        if len(ids):
            asked = {"routed": routes, "right": torch.full_like(routes, home)}
            nats = {name: _after(model, ids, model.mixing_weights(ids, routes=r), 1) for name, r in asked.items()}
            experts = [model.languages[i] for i in routes.tolist()]
            rows.append(pd.DataFrame({"language": language, "expert": experts} | nats))
    return pd.concat(rows[1:] or rows, ignore_index=True)


def _after(model: MomeForCausalLM, ids: Tensor, weights: Tensor, length: int, batch: int = 32) -> np.ndarray:
    """Mean loss in nats of the tokens from ``length`` on, of each sequence [B]."""
    found = []
    for part, own in zip(ids.split(batch), weights.split(batch), strict=True):
        logits = model(part, expert_weights=own).logits[:, length - 1 : -1].float()
        targets = part[:, length:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        found.append(losses.mean(1).cpu().numpy())
    return np.concatenate(found)


def coverage_curve(rows: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """What a threshold of abstention does: how many prompts are still routed, and the loss of all.

    Args:
        rows: of :func:`prompt_losses`, for any lengths. thresholds: probabilities that a route needs.

    Returns:
        length, threshold, coverage (share of prompts routed), nats (per token after the prompt, over all prompts,
        those that fall back included), right (share of the routed that go to their language; nan for none).
    """
    found = []
    for length, part in rows.groupby("length"):
        for threshold in thresholds:
            sure = part["probability"] >= threshold
            found.append({
                "length": length, "threshold": threshold, "coverage": float(sure.mean()),
                "nats": float(part["routed"].where(sure, part["fallback"]).mean()),
                "right": float(part.loc[sure, "right"].mean()) if sure.any() else float("nan"),
            })
    return pd.DataFrame(found)
