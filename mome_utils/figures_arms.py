"""What the arms, divergences and rules of distillation look like: a colour, a marker and a line each, for good.

Where twenty things are compared no palette keeps all of them apart, so the colour is shared by what belongs together
(darker and lighter), and marker and line differ within: two neighbours can be told apart in grey too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from matplotlib.lines import Line2D

from .figures_style import ARM_COLORS, colors, markers, name_of

__all__ = ["ArmLook", "arm_handles", "arm_look", "arm_name"]

DASHES: Mapping[str, Any] = MappingProxyType({
    "solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1.2, 1.6)), "dashdot": (0, (6, 1.8, 1.2, 1.8)),
})


@dataclass(frozen=True)
class ArmLook:
    """What an arm, a divergence or a rule looks like in every figure, and what it is called."""

    color: str
    marker: str
    line: str
    name: str

    @property
    def plot(self) -> dict[str, Any]:
        """Keywords for ``Axes.plot``."""
        return {"color": self.color, "linestyle": DASHES[self.line]}


_LOOKS: Mapping[str, ArmLook] = MappingProxyType({key: ArmLook(*look) for key, look in {
    "ce": (ARM_COLORS["ce"], "o", "dotted", "CE only"),
    "kd": ("#4A3B2A", "s", "dotted", "KD only"),
    "fixed": (ARM_COLORS["fixed"], "o", "solid", "Fixed α"),
    "soft_ce": (ARM_COLORS["fixed"], "o", "solid", "Soft cross-entropy"),
    "published_inverse_kl": (ARM_COLORS["fixed"], "D", "dashdot", "“Inverse KL” (published)"),
    "adaptive": (ARM_COLORS["adaptive"], "D", "solid", "Adaptive α"),
    "published_adaptive": (ARM_COLORS["adaptive"], "d", "dashed", "Adaptive α (published)"),
    "as_released": ("#7A2E00", "X", "dashed", "Release as it is"),
    "alternating": (ARM_COLORS["alternating"], "^", "solid", "Alternating by step"),
    "alternating_micro": ("#0B6E50", "v", "dashed", "Alternating by micro-batch"),
    "published_alternating": ("#0B6E50", "v", "dashed", "Alternating by micro-batch"),
    "forward_kl": (ARM_COLORS["forward_kl"], "s", "solid", "Forward KL"),
    "forward_kl_t2": (ARM_COLORS["forward_kl"], "P", "dashed", "Forward KL, T = 2"),
    "skew_forward": ("#A36A00", "p", "dashdot", "Skewed forward KL"),
    "skew_forward_kl": ("#A36A00", "p", "dashdot", "Skewed forward KL"),
    "jensen_shannon": ("#6A4FC4", "h", "solid", "Jensen-Shannon"),
    "skew_reverse": ("#A8327A", "<", "dashdot", "Skewed reverse KL"),
    "skew_reverse_kl": ("#A8327A", "<", "dashdot", "Skewed reverse KL"),
    "reverse_kl": (ARM_COLORS["reverse_kl"], "d", "solid", "Reverse KL"),
    "total_variation": ("#0093A8", "*", "dashed", "Total variation"),
    "linear_up": ("#4C8A1E", ">", "solid", "Linear, teacher first"),
    "linear_down": ("#86A82E", "<", "dashed", "Linear, text first"),
    "cosine_up": ("#2E5E12", ">", "dashdot", "Cosine, teacher first"),
    "cosine_down": ("#A8B84A", "<", "dotted", "Cosine, text first"),
    "uncertainty": ("#B5459E", "P", "solid", "Uncertainty"),
    "gradient_norm": ("#5B2A86", "X", "dashdot", "Gradient norm"),
    "kd_then_ce": ("#1F5F87", "s", "dashed", "Teacher, then text"),
    "ce_then_kd": ("#7DB3D1", "D", "dashed", "Text, then teacher"),
    "plateau": ("#3B3F8F", "p", "solid", "Teacher until plateau"),
    "teacher": (ARM_COLORS["teacher"], "*", "dotted", "Teacher"),
}.items()})


def arm_look(key: object) -> ArmLook:
    """The look of an arm, a divergence or a rule for α; one that is not known gets a colour of the reserve."""
    name = str(key)
    return _LOOKS.get(name) or ArmLook(colors([name])[name], markers([name])[name], "solid", name_of(name))


def arm_name(key: object) -> str:
    """What a reader sees for an arm, a divergence or a rule."""
    return arm_look(key).name


def arm_handles(keys: Sequence[str], **look: Any) -> list[Line2D]:
    """Entries of a legend: a line with its marker for each key."""
    options: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.6} | look
    return [Line2D([], [], marker=arm_look(key).marker, **arm_look(key).plot, **options) for key in keys]
