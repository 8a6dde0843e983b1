"""Why and what a model forgets: gradients that disagree, weights that drift, layers that change, kinds of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mome_utils.config import MomeError
from mome_utils.models import shifted_ce
from mome_utils.similarity import compare

__all__ = ["gradient_cosines", "layer_similarity", "part_of", "weight_drift"]


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


def part_of(name: str) -> str:
    """The part of a GPT-2 that a parameter belongs to, in words: ``transformer.h.0.mlp.c_fc.bias`` → Layer 1, MLP.

    The layer norm before a sublayer counts to it. The output projection is tied to the token embedding.
    """
    pieces = name.removeprefix("transformer.").split(".")
    if pieces[0] == "h":
        return f"Layer {int(pieces[1]) + 1}, {'attention' if pieces[2] in ('ln_1', 'attn') else 'MLP'}"
    names = {"wte": "Token embedding", "wpe": "Positions", "ln_f": "Final norm", "lm_head": "Token embedding"}
    if pieces[0] not in names:
        raise MomeError(f"The parameter '{name}' is not one of a GPT-2: give a dense model.")
    return names[pieces[0]]


def weight_drift(before: PreTrainedModel, after: PreTrainedModel) -> pd.DataFrame:
    """How far each part of a model moved: ``part, drift``, ‖after − before‖ / ‖before‖ over the part's weights.

    Parts are in the order in which a token meets them; the final norm comes last.
    """
    new = dict(after.named_parameters())
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            part = part_of(name)
            moved[part] = moved.get(part, 0.0) + float((new[name] - parameter).double().square().sum())
            size[part] = size.get(part, 0.0) + float(parameter.double().square().sum())
    return pd.DataFrame({"part": list(moved), "drift": [(moved[p] / size[p]) ** 0.5 for p in moved]})


@torch.inference_mode()
def layer_similarity(
    before: PreTrainedModel, after: PreTrainedModel, ids: Tensor, measure: str = "debiased_cka"
) -> pd.DataFrame:
    """How alike two models represent the same tokens, layer by layer: ``layer`` (0: the embedding), ``similarity``.

    Args:
        before, after: GPT-2s in evaluation mode, of one depth.
        ids: sequences ``[n, T]``; each of their ``n · T`` positions is one row.
        measure: of :mod:`mome_utils.similarity`; debiased CKA is near 0 for unrelated representations.
    """
    states: Sequence[Sequence[Tensor]] = [
        model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states for model in (before, after)
    ]
    rows = [
        {"layer": layer, "similarity": compare(measure, a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy())}
        for layer, (a, b) in enumerate(zip(*states, strict=True))
    ]
    return pd.DataFrame(rows)
