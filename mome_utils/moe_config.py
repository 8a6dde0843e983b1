"""Configuration of the mixture of modular experts (the model is in ``moe``), which transformers' AutoConfig knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from mome_utils.config import MomeError
from mome_utils.registration import register_model

if TYPE_CHECKING:
    from transformers import GPT2Config

__all__ = ["COMBINES", "COMMON", "VARIANTS", "MomeConfig"]

#: The variants, in the order of the paper.
VARIANTS = ("ple", "jeet", "moe_ce")
#: Name of the common expert; no language may bear it.
COMMON = "common"
#: How MoE-CE combines the routed and the common expert at inference.
COMBINES = ("mean", "router")


class MomeConfig(PreTrainedConfig):
    """Configuration of `MomeForCausalLM`.

    Args:
        variant: ``ple``, ``jeet`` or ``moe_ce`` (see the module's docstring).
        languages: names of the experts, in the order of their routes.
        expert: shape of one expert as a `GPT2Config` (or its dictionary); all experts have the same one.
        router_fitted: whether the router's weights are fitted; without it every call needs ``routes``.
        active_experts: languages whose experts may answer at inference, ``None`` for all. A model that is built or
            loaded with this configuration holds no others: they are left on disk.
        combine: MoE-CE at inference: ``mean`` of the routed and the common expert (as published, and always in
            training), or ``router``: the routed expert weighs its calibrated probability, the common one the rest.
        tie_word_embeddings: in JEET and MoE-CE the output projection is the token embedding. In PLE each expert's
            own configuration says whether its head is tied.
        bos_token_id, eos_token_id, pad_token_id: token ids that ``generate`` uses.

    Raises:
        MomeError: unknown variant, fewer than two languages, languages that cannot be told apart, active experts
            that are unknown or none, or an unknown ``combine``.
    """

    model_type = "mome"
    sub_configs_defaults = {"expert": SubConfigSpec(AutoConfig, model_type="gpt2")}
    keys_to_ignore_at_inference = ["past_key_values"]

    variant: str = "jeet"
    languages: list[str] | tuple[str, ...] = ("en", "fr", "de", "py")
    expert: PreTrainedConfig | dict[str, Any] | None = None
    router_fitted: bool = False
    active_experts: list[str] | tuple[str, ...] | None = None
    combine: str = "mean"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_model()
        self.languages = list(self.languages)
        if self.variant not in VARIANTS:
            raise MomeError(f"There is no MoE variant '{self.variant}': choose one of {', '.join(VARIANTS)}.")
        distinct = set(self.languages) - {COMMON}
        if len(distinct) != len(self.languages) or len(distinct) < 2:
            raise MomeError(
                f"A mixture needs at least two languages with names of their own (other than '{COMMON}'), "
                f"not {self.languages}."
            )
        self.check()

    def check(self) -> None:
        """Look at what may change after the configuration was made.

        Raises:
            MomeError: active experts that are unknown or none, or an unknown ``combine``.
        """
        if self.active_experts is not None:
            self.active_experts = self.checked_active(self.active_experts)
        if self.combine not in COMBINES:
            raise MomeError(f"There is no combine='{self.combine}': choose one of {', '.join(COMBINES)}.")

    def checked_active(self, names: Sequence[str]) -> list[str]:
        """Names of experts in the order of their routes, each once.

        Raises:
            MomeError: an unknown name, or none.
        """
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.languages:
                raise MomeError(
                    f"This model has no expert '{name}' to be active: its experts are {', '.join(self.languages)}."
                )
        if not names:
            raise MomeError(f"At least one expert must be active: name one or more of {', '.join(self.languages)}.")
        return [name for name in self.languages if name in names]

    @property
    def active(self) -> tuple[str, ...]:
        """Languages whose experts may answer."""
        return tuple(self.languages if self.active_experts is None else self.active_experts)

    @property
    def gpt2(self) -> GPT2Config:
        """The experts' configuration."""
        return cast("GPT2Config", self.expert)

    # What transformers asks any language model's configuration for; the experts' shape is kept in one place.
    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.gpt2.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.gpt2.n_embd

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of one expert."""
        return self.gpt2.n_layer

    @property
    def n_layer(self) -> int:
        """Blocks of one expert (GPT-2's name, read by its weight initialisation)."""
        return self.gpt2.n_layer

    @property
    def max_position_embeddings(self) -> int:
        """Longest context in tokens."""
        return self.gpt2.n_positions

    @property
    def initializer_range(self) -> float:
        """Standard deviation of freshly drawn weights."""
        return self.gpt2.initializer_range


AutoConfig.register(MomeConfig.model_type, MomeConfig, exist_ok=True)
