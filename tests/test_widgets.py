"""Controls beside a figure: the static figure always, the live one where it can move."""

from __future__ import annotations

import asyncio
import base64
import gc
import re
import sys
import weakref

import pytest
from matplotlib.figure import Figure

from mome_utils import widgets
from mome_utils.config import MomeError
from mome_utils.widgets import Choice, FloatSlider, IntSlider, Text, explore

CONTROLS = {
    "alpha": FloatSlider("α", 0, 1, 0.1, help="weight of the text"), "steps": IntSlider("Steps", 0, 10),
    "kind": Choice("Divergence", {"Forward KL": "forward_kl", "Reverse KL": "reverse_kl"}), "text": Text("Text"),
}
SETTINGS = [
    {"alpha": 0.5, "steps": 2, "kind": "forward_kl", "text": "a <b>", "scale": 1},
    {"alpha": 0.0, "steps": 2, "kind": "reverse_kl", "text": "", "scale": 1},
]


class Drawn:
    """A draw function that remembers what it was asked for, and which of its figures are still held."""

    def __init__(self) -> None:
        self.settings: list[dict] = []
        self.figures: list[weakref.ref] = []

    def __call__(self, **setting):
        if setting["text"] == "bad":
            raise MomeError("This text has no <tokens>: type another.")
        self.settings.append(setting)
        figure = Figure(figsize=(2, 1))
        self.figures.append(weakref.ref(figure))
        axes = figure.add_subplot()
        axes.bar([0], [setting["alpha"]])
        axes.set_ylim(0, 1)
        return axes if len(self.settings) % 2 else figure


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was displayed, in order."""
    found: list = []
    monkeypatch.setattr(widgets, "display", found.append)
    monkeypatch.delenv(widgets.STATIC, raising=False)
    return found


def live_view(shown: list, controls=CONTROLS, settings=SETTINGS, **options):
    pytest.importorskip("ipywidgets")
    draw = Drawn()
    live = explore(draw, settings, controls, show=lambda figure, words: None, **options)
    assert live is not None and shown == [live.box]
    return draw, live


def test_batch_runs_get_the_static_figures_alone(shown, monkeypatch) -> None:
    monkeypatch.setenv(widgets.STATIC, "1")
    kept: list[tuple[Figure, str]] = []
    draw = Drawn()
    assert explore(draw, SETTINGS, CONTROLS, show=lambda *figure: kept.append(figure)) is None
    assert draw.settings == SETTINGS and shown == []
    assert all(isinstance(figure, Figure) for figure, _ in kept)
    assert kept[0][1] == "α = 0.5, Steps = 2, Divergence = Forward KL, Text = a <b>, scale = 1"
    named = {"half": SETTINGS[0]}
    explore(draw, named, CONTROLS, show=lambda *figure: kept.append(figure))
    assert kept[-1][1] == "half"


def test_one_figure_can_hold_all_settings(shown, monkeypatch) -> None:
    monkeypatch.setenv(widgets.STATIC, "1")
    asked, kept = [], []

    def together(settings):
        asked.append(list(settings))
        return Figure()

    draw = Drawn()
    explore(draw, dict(zip("ab", SETTINGS, strict=True)), CONTROLS, show=lambda *f: kept.append(f), together=together)
    assert asked == [SETTINGS] and draw.settings == [] and [words for _, words in kept] == ["a; b"]


def test_without_ipywidgets_one_sentence_says_what_to_install(shown, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    real = widgets.importlib.util.find_spec
    monkeypatch.setattr(
        widgets.importlib.util, "find_spec", lambda name, *rest: None if name == "ipywidgets" else real(name, *rest)
    )
    draw = Drawn()
    assert explore(draw, SETTINGS, CONTROLS, show=lambda figure, words: None) is None
    assert draw.settings == SETTINGS
    (sentence,) = [markdown.data for markdown in shown]
    assert "pip install ipywidgets" in sentence and sentence.count(".") == 1


def test_moving_a_control_draws_the_figure_anew(shown) -> None:
    draw, live = live_view(shown)
    assert draw.settings[-1] == SETTINGS[0]  # the live figure starts where the static one did
    first = live.picture.value
    changes = {"alpha": 0.9, "steps": 7, "kind": "reverse_kl", "text": "Ein Bär"}
    for name, value in changes.items():
        live.widgets[name].value = value
    assert draw.settings[-1] == changes | {"scale": 1} and live.drawings == 5
    assert live.picture.value != first
    image = base64.b64decode(re.search(r"base64,([^\"]+)", live.picture.value).group(1))
    assert image.startswith(b"\x89PNG")
    live.widgets["alpha"].value = 0.9  # no change, no drawing
    assert live.drawings == 5


def test_controls_can_be_used_and_understood_without_a_mouse_or_eyes(shown) -> None:
    _, live = live_view(shown)
    assert [w.description for w in live.widgets.values()] == ["α", "Steps", "Divergence", "Text"]
    assert live.widgets["alpha"].tooltip == "weight of the text" and live.widgets["steps"].tooltip == "Steps"
    assert (live.widgets["alpha"].min, live.widgets["alpha"].max, live.widgets["alpha"].step) == (0, 1, 0.1)
    alt = re.search(r'alt="([^"]*)"', live.picture.value).group(1)
    assert alt.startswith("Figure for α = 0.5") and "&lt;b&gt;" in alt and "<b>" not in live.picture.value
    several = {"text": Text("Text", lines=4)}
    live = widgets.Live(Drawn(), SETTINGS[0], several)
    assert live.widgets["text"].rows == 4


def test_a_bad_value_is_said_in_the_figures_place_and_mended_by_the_next(shown) -> None:
    draw, live = live_view(shown)
    live.widgets["text"].value = "bad"
    assert "This text has no &lt;tokens&gt;: type another." in live.picture.value and "<img" not in live.picture.value
    live.widgets["text"].value = "good"
    assert "<img" in live.picture.value


def test_figures_are_not_kept(shown) -> None:
    draw, live = live_view(shown)
    for step in range(5):
        live.widgets["steps"].value = step
    gc.collect()
    assert len(draw.figures) > 5 and not any(figure() for figure in draw.figures)


def test_figures_made_with_pyplot_are_closed(shown, monkeypatch) -> None:
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("agg")
    from matplotlib import pyplot

    def draw(**setting):
        return pyplot.subplots()[1]

    pytest.importorskip("ipywidgets")
    live = explore(draw, SETTINGS, CONTROLS, show=lambda figure, words: None)
    live.widgets["steps"].value = 9
    assert pyplot.get_fignums() == []
    matplotlib.use(before)


def test_a_drag_is_drawn_now_and_then_and_always_at_its_end(shown) -> None:
    draw, live = live_view(shown, delay=0.02)
    before = live.drawings

    async def drag() -> None:
        for step in (0, 1, 3, 4, 5):
            live.widgets["steps"].value = step
        assert live.drawings == before
        await asyncio.sleep(0.1)
        assert live.drawings == before + 1 and draw.settings[-1]["steps"] == 5
        live.widgets["steps"].value = 6
        await asyncio.sleep(0.1)

    asyncio.run(drag())
    assert live.drawings == before + 2 and draw.settings[-1]["steps"] == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "at least one setting"),
        ([{"alpha": 0.5, "steps": 1, "kind": "forward_kl"}], "says nothing about 'text'"),
        ([SETTINGS[0] | {"alpha": 1.5}], "'alpha' cannot be 1.5"),
        ([SETTINGS[0] | {"steps": 1.5}], "'steps' cannot be 1.5"),
        ([SETTINGS[0] | {"kind": "tv"}], "'kind' cannot be 'tv'"),
        ([SETTINGS[0] | {"text": 3}], "'text' cannot be 3"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_drawn(shown, settings, words: str) -> None:
    draw = Drawn()
    with pytest.raises(MomeError, match=words):
        explore(draw, settings, CONTROLS, show=lambda figure, words: None)
    assert draw.settings == [] and shown == []


KERNEL_CODE = """
from matplotlib.figure import Figure
from mome_utils.widgets import FloatSlider, explore
def draw(alpha):
    figure = Figure(figsize=(1, 1)); figure.add_subplot().bar([0], [alpha]); return figure
live = explore(draw, [{"alpha": 0.5}], {"alpha": FloatSlider("α", 0, 1)}, show=lambda figure, words: None)
live.widgets["alpha"].comm.comm_id
"""


def test_in_a_kernel_a_message_of_the_slider_moves_the_figure(monkeypatch) -> None:
    """What Jupyter's front end sends when somebody drags, received by a real kernel."""
    pytest.importorskip("ipywidgets")
    from jupyter_client.manager import start_new_kernel

    monkeypatch.delenv(widgets.STATIC, raising=False)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        def answer(code: str) -> str:
            found = []
            client.execute_interactive(code, timeout=60, output_hook=found.append)
            results = [message["content"] for message in found if message["msg_type"] == "execute_result"]
            assert results, [message["content"] for message in found]
            return results[-1]["data"]["text/plain"]

        name = answer(KERNEL_CODE).strip("'")
        for value in (0.6, 0.7, 0.9):
            content = {"comm_id": name, "data": {"method": "update", "state": {"value": value}, "buffer_paths": []}}
            client.shell_channel.send(client.session.msg("comm_msg", content))
        answer("import asyncio; await asyncio.sleep(0.5); 'messages after this wait'")
        assert answer("(live.setting, live.drawings <= 4)") == "({'alpha': 0.9}, True)"
        assert answer("'α = 0.9' in live.picture.value") == "True"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
