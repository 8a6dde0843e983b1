"""Annotated corpora from files: CoNLL-2003, Universal Dependencies and any file in CoNLL-U.

Nothing is downloaded. A folder holds one file per split, found by its name: CoNLL-2003 as distributed (``eng.train``,
``eng.testa``, ``eng.testb``), a UD treebank (``en_ewt-ud-train.conllu``, ``-dev``, ``-test``), or files called
``train``, ``dev`` or ``validation``, and ``test`` with the suffix ``.conllu``, ``.conll`` or ``.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mome_utils.config import MomeError
from mome_utils.tagging import Tagged, to_bio

__all__ = ["read_conll", "read_conllu", "read_folder"]

_SPLITS = {
    "train": ("train",), "validation": ("testa", "dev", "validation", "valid"), "test": ("testb", "test"),
}
_SUFFIXES = (".conllu", ".conll", ".txt", ".train", ".testa", ".testb")
_FIELDS = {"form": 1, "lemma": 2, "upos": 3, "xpos": 4, "feats": 5, "head": 6, "deprel": 7, "deps": 8, "misc": 9}


def read_conll(path: Path, *, column: int = -1, language: str = "en") -> list[Tagged]:
    """Sentences of a column file (Tjong Kim Sang & De Meulder 2003): a word a line, empty lines between sentences.

    Labels come out in BIO (:func:`mome_utils.tagging.to_bio`). ``-DOCSTART-`` lines begin a new document; sentences of
    one document share its id.

    Args:
        path: the file, columns separated by spaces or tabs, the word first.
        column: which column holds the label.
        language: language code of the text.

    Raises:
        MomeError: the file cannot be read, a line lacks columns, a label is not O, B-… or I-…, or no word is in it.
    """
    found: list[Tagged] = []
    words: list[str] = []
    labels: list[str] = []
    document = 0
    for number, line in _lines(path):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2 or len(fields) < abs(column):
                raise MomeError(
                    f"Line {number} of {path.name} has {len(fields)} column(s): every word needs its label beside it."
                )
            label = fields[column]
            if label != "O" and (label[:2] not in ("B-", "I-") or len(label) < 3):
                raise MomeError(f"Line {number} of {path.name} has the label '{label}', not O, B-… or I-…: mend it.")
            words.append(fields[0])
            labels.append(label)
            continue
        if words:
            found.append(_tagged(f"{path.stem}-{document:05d}", language, words, to_bio(labels)))
            words, labels = [], []
        document += bool(fields)
    if words:
        found.append(_tagged(f"{path.stem}-{document:05d}", language, words, to_bio(labels)))
    return _some(found, path)


def read_conllu(path: Path, *, field: str = "upos", language: str = "en") -> list[Tagged]:
    """Sentences of a file in CoNLL-U (Nivre et al. 2020), labelled by one of its fields.

    Multiword tokens (``1-2``) and empty nodes (``1.1``) are passed over: the syntactic words carry the labels.
    Sentences share the document of the last ``# newdoc``; without one each sentence is its own.

    Raises:
        MomeError: an unknown field, a file that cannot be read, a line without ten fields, or no word.
    """
    if field not in _FIELDS:
        raise MomeError(f"CoNLL-U has no field '{field}': choose from {', '.join(_FIELDS)}.")
    found: list[Tagged] = []
    words: list[str] = []
    labels: list[str] = []
    documents = sentence = 0
    for number, line in [*_lines(path), (0, "")]:
        if line.startswith("#"):
            documents += line[1:].split()[:1] == ["newdoc"]
            continue
        if line.strip():
            fields = line.split("\t")
            if len(fields) != 10:
                raise MomeError(
                    f"Line {number} of {path.name} has {len(fields)} field(s) instead of the ten of CoNLL-U, "
                    "separated by tabs: mend it."
                )
            if fields[0].isdigit():
                words.append(fields[1])
                labels.append(fields[_FIELDS[field]])
            continue
        if words:
            sentence += 1
            name = f"{path.stem}-{documents:05d}" if documents else f"{path.stem}-s{sentence:05d}"
            found.append(_tagged(name, language, words, labels))
            words, labels = [], []
    return _some(found, path)


def read_folder(
    folder: Path, *, field: str = "upos", column: int = -1, language: str = "en"
) -> dict[str, list[Tagged]]:
    """The splits of an annotated corpus: ``train``, ``test`` and, if there is one, ``validation``.

    Raises:
        MomeError: no folder, no file for training or for testing, two files for one split, or a file that cannot be
            used.
    """
    if not folder.is_dir():
        raise MomeError(f"There is no folder '{folder.name}' with annotated files: give one that exists.")
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    found: dict[str, list[Tagged]] = {}
    for split, names in _SPLITS.items():
        own = [path for path in files if _split_name(path) in names]
        if len(own) > 1:
            raise MomeError(f"'{folder.name}' has {len(own)} files for {split}: keep one.")
        if own:
            read = read_conllu(own[0], field=field, language=language) if own[0].suffix == ".conllu" else None
            found[split] = read or read_conll(own[0], column=column, language=language)
        elif split != "validation":
            raise MomeError(
                f"'{folder.name}' has no file for {split}: name one {names[0]}.conllu, {names[0]}.conll or "
                f"as in CoNLL-2003 and UD."
            )
    return found


def _split_name(path: Path) -> str:
    """``train`` of ``eng.train``, of ``en_ewt-ud-train.conllu`` and of ``train.txt``."""
    last = path.suffix[1:] if path.suffix in (".train", ".testa", ".testb") else path.stem
    return last.rsplit("-", 1)[-1].lower()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends.

    Raises:
        MomeError: the file is not there or is no UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError:
        raise MomeError(f"The annotated file '{path.name}' cannot be read: check its name.") from None
    except UnicodeDecodeError as error:
        raise MomeError(f"{path.name} is not UTF-8 (byte {error.start}): convert it to UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.rstrip("\r")


def _tagged(document: str, language: str, words: Sequence[str], labels: Sequence[str]) -> Tagged:
    """A sentence as a text with spaces between its words."""
    spans, reached = [], 0
    for word, label in zip(words, labels, strict=True):
        spans.append((reached, reached + len(word), label))
        reached += len(word) + 1
    return Tagged(document, language, " ".join(words), tuple(spans))


def _some(found: list[Tagged], path: Path) -> list[Tagged]:
    if not found:
        raise MomeError(f"{path.name} holds no labelled word: check that it is the file you mean.")
    return found
