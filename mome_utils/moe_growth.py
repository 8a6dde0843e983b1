"""Mixtures from finished models, and experts that come and go, while the others stay as they are to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mome_utils.config import MomeError
from mome_utils.moe_config import COMMON, MomeConfig
from mome_utils.moe_identity import function_of, vocabulary_digest, vocabulary_in
from mome_utils.moe_inference import Absent, Inference
from mome_utils.routing import TokenRouter

__all__ = ["Growth", "without_language"]

#: transformers' name for the weights of a model.
_WHOLE = "model.safetensors"


class Growth(Inference):
    """Part of `MomeForCausalLM`: assemble a mixture, add an expert, remove one."""

    if TYPE_CHECKING:
        all_tied_weights_keys: dict[str, str]
        device: torch.device

    @classmethod
    def from_experts(
        cls, experts: Mapping[str, GPT2LMHeadModel | Path | str], router: TokenRouter | None = None
    ) -> Self:
        """Assemble PLE from one finished GPT-2 per language; the weights are copied.

        Args:
            experts: by language, in the order of their routes: models, or folders that transformers saved. All
                have one shape and one tokenizer; tokenizers that lie in the folders are compared.
            router: fitted for these languages in this order.

        Raises:
            MomeError: experts of different shape or vocabulary, a folder without a GPT-2, or a router of other
                languages.
        """
        if not experts:
            raise MomeError("A mixture needs at least two experts, and none was given.")
        vocabulary = _common_vocabulary({n: Path(s) for n, s in experts.items() if isinstance(s, str | Path)})
        models = {name: _gpt2(source) for name, source in experts.items()}
        first, *others = models
        for name in others:
            if function_of(models[name].config) != function_of(models[first].config):
                raise MomeError(
                    f"The experts '{first}' and '{name}' differ in shape or vocabulary: "
                    "train all experts with one shape and one tokenizer."
                )
        gpt2 = models[first].config
        make: Any = MomeConfig  # the base class takes more than its generated signature says
        build: Any = cls
        model = build(make(
            variant="ple", languages=list(models), expert=deepcopy(gpt2), bos_token_id=gpt2.bos_token_id,
            eos_token_id=gpt2.eos_token_id, pad_token_id=gpt2.pad_token_id,
        ))
        for own, student in zip(model.experts, models.values(), strict=True):
            own.load_state_dict(student.state_dict())
        model.vocabulary = vocabulary_digest(vocabulary)
        if router is not None:
            model.set_router(router)
        return cast(Self, model.train(models[first].training))

    def add_expert(
        self, name: str, expert: nn.Module | Path | str, router: TokenRouter | None = None,
        sequences: Sequence[Any] | None = None,
    ) -> None:
        """Add an expert to this model, in place: it comes last, so all routes stay as they are.

        The weights are copied; those of the other experts, and what is shared, stay as they are to the last bit.
        The new parameters belong to no optimizer that was made before.

        Args:
            name: its language.
            expert: a GPT-2 or the folder of one (PLE takes all of it; JEET and MoE-CE its blocks and final layer
                norm, for they share the embedding), or an expert of a mixture, such as ``model.experts[0]``.
            router: for all languages, the new one last.
            sequences: token ids of text in the new language, from which the model's router learns it
                (`router_growth.add_language`), where no router is given. With neither, calls need routes.

        Raises:
            MomeError: a name that is taken, an expert of another shape or vocabulary, a folder with another
                tokenizer than the model's (where that is known), or a router that does not fit; nothing has changed
                then.
        """
        languages = (*self.languages, name)
        if name in (*self.languages, COMMON):
            raise MomeError(f"The model already has an expert '{name}': choose another name.")
        if isinstance(expert, str | Path) and self.vocabulary is not None:
            if vocabulary_digest(vocabulary_in(Path(expert))) not in (None, self.vocabulary):
                raise MomeError(
                    f"The expert '{name}' has another tokenizer than the model: "
                    "a mixture needs experts that were trained with one tokenizer."
                )
        template = next(own for own in self.experts if not isinstance(own, Absent))
        new = _filled(template, _gpt2(expert) if isinstance(expert, str | Path) else expert, name)
        if router is None and sequences is not None:
            from mome_utils.router_growth import add_language  # scikit-learn is heavy, and only this needs it

            router = add_language(deepcopy(self._fitted_router()).cpu(), name, sequences)
        grown = self._routed(languages, router)
        self.experts.append(new)
        if self.config.active_experts is not None:
            self.config.active_experts = [*self.config.active_experts, name]
        self._rename(languages, grown, router is not None)

    def remove_expert(self, name: str) -> None:
        """Take an expert out of this model, in place; later routes move down by one.

        The other experts, and what is shared, stay as they are to the last bit. The router loses its row: among
        the other languages it decides as before (calibrate it again where its probabilities matter).

        Raises:
            MomeError: an unknown expert, one of the last two, or the last active one; nothing has changed then.
        """
        if name not in self.languages:
            known = ", ".join(self.languages)
            raise MomeError(f"This model has no expert '{name}' to remove: its experts are {known}.")
        if len(self.languages) < 3:
            raise MomeError("A mixture needs at least two experts: add one before you remove one.")
        active = [other for other in self.active if other != name]
        if not active:
            raise MomeError(f"'{name}' is the last active expert: call set_active with another one first.")
        languages = tuple(other for other in self.languages if other != name)
        fitted = self.config.router_fitted
        smaller = self._routed(languages, without_language(self.router, name) if fitted else None)
        del self.experts[self.languages.index(name)]
        if self.config.active_experts is not None:
            self.config.active_experts = active
        self._rename(languages, smaller, fitted)

    def _routed(self, languages: tuple[str, ...], router: TokenRouter | None) -> TokenRouter:
        """A router of the model's own for these languages: a copy of the given one, or one that is not fitted."""
        own = TokenRouter(self.config.vocab_size, languages)
        if router is not None:
            if tuple(router.languages) != languages or router.vocab_size != own.vocab_size:
                raise MomeError(
                    f"The router knows {', '.join(router.languages)} and {router.vocab_size} tokens, but the experts "
                    f"would be {', '.join(languages)} with {own.vocab_size}: fit it for these, in this order."
                )
            own.load_state_dict(router.state_dict())
        return own.to(self.device)

    def _rename(self, languages: tuple[str, ...], router: TokenRouter, fitted: bool) -> None:
        """Make the rest of the model fit its changed experts."""
        self.router = router
        self.config.languages = list(languages)
        self.config.router_fitted = fitted
        model: Any = self
        self.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def without_language(router: TokenRouter, name: str) -> TokenRouter:
    """The router without the row of one language; all other numbers stay bit by bit.

    Raises:
        MomeError: it does not know the language, or only one would be left.
    """
    if name not in router.languages:
        raise MomeError(f"The router does not know '{name}': it knows {', '.join(router.languages)}.")
    smaller = TokenRouter(router.vocab_size, [other for other in router.languages if other != name])
    kept = torch.tensor([other != name for other in router.languages])
    for key, buffer in router.state_dict().items():
        own = smaller.get_buffer(key)
        own.copy_(buffer if own.shape == buffer.shape else buffer[kept.to(buffer.device)])
    return smaller


def _gpt2(source: nn.Module | Path | str) -> GPT2LMHeadModel:
    """The GPT-2 itself, or the one in a folder, in float32."""
    if isinstance(source, GPT2LMHeadModel):
        return source
    if not isinstance(source, str | Path):
        raise MomeError(f"An expert is a GPT2LMHeadModel or the folder of one, not a {type(source).__name__}.")
    described = Path(source) / "config.json"
    try:
        kind = json.loads(described.read_text(encoding="utf-8")).get("model_type") if described.is_file() else None
    except ValueError:
        kind = None
    if kind != "gpt2":
        raise MomeError(
            f"'{Path(source).name}' is not the folder of a GPT-2: "
            "give a folder that GPT2LMHeadModel.save_pretrained wrote."
        )
    if not any((Path(source) / file).is_file() for file in (_WHOLE, f"{_WHOLE}.index.json")):
        raise MomeError(
            f"'{Path(source).name}' holds no '{_WHOLE}': save the GPT-2 again, as transformers does by default."
        )
    # Never a pickle, whatever else lies in the folder.
    return GPT2LMHeadModel.from_pretrained(source, local_files_only=True, dtype=torch.float32, use_safetensors=True)


def _filled(template: nn.Module, source: nn.Module, name: str) -> nn.Module:
    """A new expert like ``template`` with the weights of ``source``.

    Raises:
        MomeError: the source has another shape, or is no expert.
    """
    state: Mapping[str, Tensor] = source.state_dict()
    if isinstance(source, GPT2LMHeadModel) and not isinstance(template, GPT2LMHeadModel):
        state = {k: v for k, v in source.transformer.state_dict().items() if k.startswith(("h.", "ln_f."))}
    config, own = getattr(source, "config", None), cast(GPT2Config, template.config)
    shapes = {key: tensor.shape for key, tensor in template.state_dict().items()}
    same = isinstance(config, GPT2Config) and function_of(config) == function_of(own)
    if not same or {key: tensor.shape for key, tensor in state.items()} != shapes:
        raise MomeError(
            f"The expert '{name}' differs from the others in shape or vocabulary: "
            "train it with their shape and their tokenizer."
        )
    new = deepcopy(template).requires_grad_(True)
    new.load_state_dict(state)
    return new


def _common_vocabulary(folders: Mapping[str, Path]) -> dict[str, int] | None:
    """The one vocabulary of the tokenizers that lie in the experts' folders; ``None`` where none does.

    Raises:
        MomeError: two of them differ.
    """
    found = {name: vocabulary for name, folder in folders.items() if (vocabulary := vocabulary_in(folder)) is not None}
    for name in found:
        first = next(iter(found))
        if found[name] != found[first]:
            raise MomeError(
                f"The experts '{first}' and '{name}' have different tokenizers: "
                "a mixture needs experts that were trained with one tokenizer."
            )
    return next(iter(found.values()), None)
