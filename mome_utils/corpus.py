"""Documents and where they come from.

A corpus is a folder with one source per language. Documents that share an id are about the same topic
("aligned"); ids decide the splits and the balancing later, so they are settled here, once.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mome_utils.config import MomeError

EMBEDDED_LANGUAGES = ("en", "fr", "de", "py")
PYTHON_CODES = frozenset({"py", "python"})

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class CorpusError(MomeError):
    """A corpus cannot be read or used as it is."""


@dataclass(frozen=True)
class Document:
    """One text. `id` is the topic: the same id in two languages means the same subject."""

    id: str
    language: str
    group: str
    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents of two or more languages, ordered by language and then by id."""

    name: str
    languages: tuple[str, ...]
    documents: tuple[Document, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) over every field of every document, in order."""
        state = hashlib.sha256()
        for d in self.documents:
            record = json.dumps([d.id, d.language, d.group, d.title, d.text], ensure_ascii=True)
            state.update(record.encode("ascii") + b"\n")
        return state.hexdigest()[:16]

    @cached_property
    def _by_language(self) -> Mapping[str, tuple[Document, ...]]:
        return {code: tuple(d for d in self.documents if d.language == code) for code in self.languages}

    def of_language(self, language: str) -> tuple[Document, ...]:
        """The documents of one language, in order of id; `CorpusError` for a language that is not here."""
        if language not in self._by_language:
            raise CorpusError(
                f"The corpus has no language {language!r}; choose from {', '.join(self.languages)}."
            )
        return self._by_language[language]


def load_corpus(
    source: str = "embedded",
    languages: Sequence[str] | None = None,
    *,
    topics: int | None = None,
    root: Path | None = None,
) -> Corpus:
    """Read a corpus and return its documents in a fixed order.

    Parameters
    ----------
    source : "embedded" for `root`/data/corpus, anything else is the path of a folder that holds, for each
        language, `<language>.jsonl`, `<language>.parquet` or a folder `<language>` of .txt files (UTF-8).
        Records have `text` and, if wanted, `id`, `group` and `title`; a record without an id gets its line
        number with the language before it, and so is aligned with nothing. The id of a .txt file is its
        path inside the folder without the suffix.
    languages : codes in the order wanted; None or empty means all of them.
    topics : keep at most this many documents of each language, topics of all languages first, spread
        evenly over the groups.
    root : the repository's root, only needed for "embedded" (default: the folder above this package).

    Raises
    ------
    CorpusError : one sentence, for a folder, file, record or language that cannot be used.
    """
    if source == "embedded":
        folder = (root or Path(__file__).resolve().parent.parent) / "data" / "corpus"
    else:
        folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"The corpus folder {str(source)!r} does not exist; give 'embedded' or a folder with one .jsonl, "
            ".parquet or folder of .txt files per language."
        )
    places = _places(folder)
    order = EMBEDDED_LANGUAGES if source == "embedded" else tuple(sorted(places))
    wanted = tuple(languages) if languages else tuple(code for code in order if code in places)
    for code in wanted:
        if code not in places:
            known = ", ".join(code for code in order if code in places) or "none"
            raise CorpusError(f"The corpus has no language {code!r}; it has {known}.")
    if len(set(wanted)) != len(wanted):
        raise CorpusError(f"A language is asked for twice in {', '.join(wanted)}; name each once.")
    if len(wanted) < 2:
        raise CorpusError(
            f"The study needs at least 2 languages and found {len(wanted)}; add a file per language."
        )
    documents = {code: _read_language(places[code], code) for code in wanted}
    if topics is not None:
        documents = _keep_topics(documents, topics)
    name = "embedded" if source == "embedded" else folder.name
    return Corpus(name, wanted, tuple(d for code in wanted for d in documents[code]))


def units(text: str, language: str) -> list[str]:
    """Split a text where it may be cut: after a paragraph, or after a top-level statement of Python.

    The pieces join to exactly the text. Python is only parsed, never run; source that does not parse is
    treated as prose. Prose without an empty line is split into its lines.
    """
    if language.lower() in PYTHON_CODES:
        starts = _statement_starts(text)
    else:
        starts = []
    if not starts:
        starts = [m.end() for m in _BLANK_LINES.finditer(text)] or [m.end() for m in _LINE.finditer(text)]
    edges = sorted({0, len(text), *(s for s in starts if text[:s].strip())})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _statement_starts(text: str) -> list[int]:
    """Offsets at which the second and later top-level statements begin, with the comments above them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in somebody's string is no concern of ours
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    offsets = [0]
    for match in _LINE.finditer(text):  # the parser's idea of a line; str.splitlines knows more separators
        offsets.append(match.end())
    starts = []
    for before, node in zip(body, body[1:], strict=False):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        line = before.end_lineno or before.lineno  # 1-based and inclusive: index of the line after it
        if first <= line:
            continue  # two statements on one line stay together
        while line < first - 1 and not text[offsets[line] : offsets[line + 1]].strip():
            line += 1  # empty lines stay with what is above, comments go with what is below
        starts.append(offsets[line])
    return starts


def _places(folder: Path) -> dict[str, Path]:
    """Language code -> the file or folder that holds it."""
    places: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if next(path.rglob("*.txt"), None) is None:
                continue
            code = path.name
        elif path.suffix in (".jsonl", ".parquet"):
            code = path.stem
        else:
            continue
        if code in places:
            raise CorpusError(
                f"Language {code!r} has two sources, {places[code].name} and {path.name}; keep one."
            )
        places[code] = path
    return places


def _read_language(path: Path, language: str) -> list[Document]:
    """All documents of one source in order of id."""
    if path.is_dir():
        records: Iterable[tuple[str, Any]] = _text_records(path)
    elif path.suffix == ".jsonl":
        records = _jsonl_records(path)
    else:
        records = _parquet_records(path)
    documents: dict[str, Document] = {}
    for number, (where, record) in enumerate(records, start=1):
        document = _document(record, language, number, where)
        if document.id in documents:
            raise CorpusError(
                f"The id {document.id!r} occurs twice in {path.name} (at {where}); ids must be unique."
            )
        documents[document.id] = document
    if not documents:
        raise CorpusError(f"{path.name} is empty; give it at least one document or remove it.")
    return [documents[key] for key in sorted(documents)]


def _document(record: Any, language: str, number: int, where: str) -> Document:
    """Check one record and make a document of it."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CorpusError(f"{where} has no text; every record needs a 'text' field with a string.")
    text = record["text"]
    if not text.strip():
        raise CorpusError(f"{where} is empty; remove it or give it a text.")
    if _SURROGATE.search(text):
        raise CorpusError(
            f"{where} holds half of a surrogate pair, which is not valid UTF-8; repair the text."
        )
    given = record.get("id")
    key = f"{language}-{number:07d}" if given is None or given == "" else str(given)
    return Document(key, language, str(record.get("group") or ""), str(record.get("title") or ""), text)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise CorpusError(f"{path.name} is empty; give it a text or remove it.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path.name} is not UTF-8 (byte {error.start}); convert it to UTF-8.") from None


def _text_records(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for path in sorted(folder.rglob("*.txt")):
        stem = path.relative_to(folder).with_suffix("")
        group = stem.parent.as_posix()
        yield (
            f"{folder.name}/{stem.as_posix()}.txt",
            {
                "id": stem.as_posix(),
                "group": "" if group == "." else group,
                "title": stem.name,
                "text": _decode(path),
            },
        )


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where} is not JSON ({error.msg}); write one object a line.") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError):
        raise CorpusError(f"{path.name} is not a readable Parquet file; write it again.") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path.name} row {number}", row


def _keep_topics(documents: Mapping[str, list[Document]], topics: int) -> dict[str, list[Document]]:
    """At most `topics` documents of each language, common topics first, spread over the groups."""
    if topics < 1:
        raise CorpusError(f"topics must be at least 1, not {topics}.")
    ids = [{d.id for d in docs} for docs in documents.values()]
    common = set.intersection(*ids)
    kept = {}
    for code, docs in documents.items():
        shared = _spread([d for d in docs if d.id in common])
        own = _spread([d for d in docs if d.id not in common])
        kept[code] = sorted([*shared, *own][:topics], key=lambda d: d.id)
    return kept


def _spread(documents: Sequence[Document]) -> list[Document]:
    """Reorder so that every prefix takes about the same number from each group."""
    rank: dict[str, int] = {}
    keyed = []
    for d in sorted(documents, key=lambda d: (d.group, d.id)):
        position = rank.get(d.group, 0)
        rank[d.group] = position + 1
        keyed.append(((position, d.group, d.id), d))
    return [d for _, d in sorted(keyed, key=lambda pair: pair[0])]
