"""Controls beside a figure: a reader drags, the figure follows; and without a live kernel a static figure stays.

A notebook always shows its static figure, of a few chosen settings, so that its executed copy can be read anywhere.
The controls come below it only where somebody can move them: not while notebooks are executed in batch (the
environment variable ``MOME_STATIC``), and not where ipywidgets is missing, which is then said in one sentence.
"""

from __future__ import annotations

import asyncio
import base64
import html
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mome_utils.config import MomeError
from mome_utils.figures_style import number, png_bytes

__all__ = ["Choice", "Control", "FloatSlider", "IntSlider", "Live", "Text", "explore", "is_static"]

STATIC = "MOME_STATIC"
#: Seconds in which all changes make one drawing: dragging a slider sends many.
DELAY = 0.1
#: How wide a live figure is shown, in CSS pixels per inch: as wide as the static one.
PIXELS = 100
#: Dots per inch of a live figure: fewer than in a static one, because each is drawn while somebody waits.
DOTS = 110

Draw = Callable[..., Figure | Axes]


@dataclass(frozen=True)
class FloatSlider:
    """A number between ``low`` and ``high`` in steps of ``step``."""

    label: str
    low: float
    high: float
    step: float = 0.01
    help: str = ""

    def holds(self, value: object) -> bool:
        """Whether ``value`` is one that this control can have."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def widget(self, toolkit: Any, value: Any, common: Mapping[str, Any]) -> Any:
        """The control as a widget of ``toolkit`` (ipywidgets)."""
        return toolkit.FloatSlider(value=value, min=self.low, max=self.high, step=self.step, **common)


@dataclass(frozen=True)
class IntSlider:
    """A whole number between ``low`` and ``high``."""

    label: str
    low: int
    high: int
    step: int = 1
    help: str = ""

    def holds(self, value: object) -> bool:
        """Whether ``value`` is one that this control can have."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def widget(self, toolkit: Any, value: Any, common: Mapping[str, Any]) -> Any:
        """The control as a widget of ``toolkit`` (ipywidgets)."""
        return toolkit.IntSlider(value=value, min=self.low, max=self.high, step=self.step, **common)


@dataclass(frozen=True)
class Choice:
    """One of several values; ``options`` are the values, or name → value."""

    label: str
    options: Sequence[object] | Mapping[str, object]
    help: str = ""

    def holds(self, value: object) -> bool:
        """Whether ``value`` is one that this control can have."""
        return value in (self.options.values() if isinstance(self.options, Mapping) else self.options)

    def widget(self, toolkit: Any, value: Any, common: Mapping[str, Any]) -> Any:
        """The control as a widget of ``toolkit`` (ipywidgets)."""
        pairs = self.options.items() if isinstance(self.options, Mapping) else [(str(o), o) for o in self.options]
        return toolkit.Dropdown(value=value, options=list(pairs), **common)


@dataclass(frozen=True)
class Text:
    """A text of one line, or of several with ``lines`` above 1."""

    label: str
    placeholder: str = ""
    lines: int = 1
    help: str = ""

    def holds(self, value: object) -> bool:
        """Whether ``value`` is one that this control can have."""
        return isinstance(value, str)

    def widget(self, toolkit: Any, value: Any, common: Mapping[str, Any]) -> Any:
        """The control as a widget of ``toolkit`` (ipywidgets)."""
        options = dict(common, value=value, placeholder=self.placeholder)
        return toolkit.Textarea(rows=self.lines, **options) if self.lines > 1 else toolkit.Text(**options)


Control = FloatSlider | IntSlider | Choice | Text


def is_static() -> bool:
    """Whether the environment asks for static figures only (``MOME_STATIC`` is set to something but 0)."""
    return os.environ.get(STATIC, "") not in ("", "0")


def explore(
    draw: Draw,
    settings: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    controls: Mapping[str, Control],
    *,
    show: Callable[[Figure, str], None],
    together: Callable[[Sequence[Mapping[str, Any]]], Figure] | None = None,
    delay: float = DELAY,
) -> Live | None:
    """Show the figure of the given settings, and below it controls that draw it anew.

    Args:
        draw: function(**setting) → a figure, or axes of one.
        settings: what the static figure shows (three are a good number), with a name each or without; the live
            figure starts with the first.
        controls: a control for each argument of ``draw`` that the reader may change; an argument without one keeps
            the first setting's value.
        show: how a static figure is shown, called with the figure and its setting in words, for example
            ``lambda figure, what: study.show(figure, "explore", caption=what, alt=what)``.
        together: makes one figure of all settings; without it each setting gets a figure of its own.
        delay: seconds in which all changes make one drawing.

    Returns:
        The live view, where there is one: its ``widgets`` can be read and set.

    Raises:
        MomeError: no settings, a control for something that the settings lack, or a setting that its control
            cannot have: before anything is drawn.

    Example:
        >>> explore(draw, [{"alpha": 0.5}], {"alpha": FloatSlider("α", 0, 1)}, show=show)  # doctest: +SKIP
    """
    named = dict(settings) if isinstance(settings, Mapping) else {in_words(s, controls): s for s in settings}
    _check(named, controls)
    if together is not None:
        show(_figure(together(list(named.values()))), "; ".join(named))
    else:
        for name, setting in named.items():
            figure = _figure(draw(**setting))
            show(figure, name)
            _close(figure)
    if is_static():
        return None
    if importlib.util.find_spec("ipywidgets") is None:
        display(Markdown("*To move this figure's controls yourself, install ipywidgets: `pip install ipywidgets`.*"))
        return None
    live = Live(draw, next(iter(named.values())), controls, delay)
    display(live.box)
    return live


def in_words(setting: Mapping[str, Any], controls: Mapping[str, Control]) -> str:
    """A setting as text, in the order of the controls: ``α = 0.5, divergence = reverse_kl``."""
    known = [name for name in controls if name in setting]
    parts = []
    for name in [*known, *(name for name in setting if name not in controls)]:
        value, control = setting[name], controls.get(name)
        if isinstance(control, Choice) and isinstance(control.options, Mapping):
            value = next((shown for shown, held in control.options.items() if held == value), value)
        text = number(value, ".4g") if isinstance(value, float) else str(value)
        parts.append(f"{control.label if control else name} = {text}")
    return ", ".join(parts)


def _check(settings: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Control]) -> None:
    if not settings:
        raise MomeError("An exploration needs at least one setting: give what the static figure shows.")
    for name, setting in settings.items():
        for key, control in controls.items():
            if key not in setting:
                raise MomeError(f"The setting '{name}' says nothing about '{key}', which has a control: add it.")
            if not control.holds(setting[key]):
                raise MomeError(f"The control '{key}' cannot be {setting[key]!r}: change the setting '{name}'.")


def _figure(drawn: Figure | Axes) -> Figure:
    """The whole figure of what a draw function returned."""
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise MomeError("The draw function of an exploration must return a matplotlib figure or axes of one.")
    return figure


def _close(figure: Figure) -> None:
    """Let pyplot forget a figure, if it was made there: it would hold it for good."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


class Live:
    """Controls and the figure they draw: the live half of :func:`explore`.

    ``widgets`` holds the control of each argument, ``box`` all of them with the picture. Changes are drawn together
    once ``delay`` seconds have passed since the first of them, so a drag shows its way and always its end; outside
    of a running event loop (a script, a test) each change is drawn at once. A `MomeError` of the draw function is
    shown as its sentence in the figure's place.
    """

    def __init__(
        self, draw: Draw, setting: Mapping[str, Any], controls: Mapping[str, Control], delay: float = DELAY
    ) -> None:
        toolkit = importlib.import_module("ipywidgets")
        self.draw, self.delay, self.controls = draw, delay, dict(controls)
        self.constant = {name: value for name, value in setting.items() if name not in controls}
        self.drawings = 0
        self._waiting: asyncio.TimerHandle | None = None
        self.picture = toolkit.HTML()
        self.widgets = {
            name: control.widget(toolkit, setting[name], self._common(toolkit, control))
            for name, control in controls.items()
        }
        for widget in self.widgets.values():
            widget.observe(self._changed, "value")
        self.box = toolkit.VBox([*self.widgets.values(), self.picture])
        self.redraw()

    def _common(self, toolkit: Any, control: Control) -> dict[str, Any]:
        """What all controls share: a label that is read out, help on hover and focus, and room for both."""
        common: dict[str, Any] = {
            "description": control.label, "tooltip": control.help or control.label,
            "style": {"description_width": "9em"}, "layout": toolkit.Layout(width="min(40em, 100%)"),
        }
        return common if isinstance(control, Choice) else common | {"continuous_update": True}

    @property
    def setting(self) -> dict[str, Any]:
        """The arguments of the next drawing."""
        return self.constant | {name: widget.value for name, widget in self.widgets.items()}

    def _changed(self, change: object) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop runs here: nothing could come later
            self.redraw()
            return
        if self._waiting is None:
            self._waiting = loop.call_later(self.delay, self.redraw)

    def redraw(self) -> None:
        """Draw the present setting into the picture."""
        self._waiting = None
        setting = self.setting
        try:
            figure = _figure(self.draw(**setting))
        except MomeError as problem:
            self.picture.value = f'<p role="alert">{html.escape(str(problem))}</p>'
            return
        image = base64.b64encode(png_bytes(figure, dpi=DOTS)).decode()
        words = html.escape(in_words(setting, self.controls), quote=True)
        width = round(figure.get_figwidth() * PIXELS)
        self.picture.value = (
            f'<img alt="Figure for {words}" style="width:{width}px;max-width:100%" src="data:image/png;base64,{image}">'
        )
        self.drawings += 1
        _close(figure)
