"""The data set as a resource of its own: balanced documents in Parquet and JSONL, with tokenizer and
manifest.

This is what the command `mome dataset` writes, for readers who want the data and not the study.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mome_utils.artifacts import digest, file_digest, write_atomic, write_folder_atomic
from mome_utils.balance import difference_percent
from mome_utils.config import MomeError
from mome_utils.corpus import Corpus, Document
from mome_utils.dataset import DATA_SEED, Prepared, prepare

__all__ = ["ExportError", "create_resource", "export"]

Format = Literal["parquet", "jsonl"]
FORMATS = ("parquet", "jsonl")
FIELDS = ("id", "language", "group", "title", "text")


class ExportError(MomeError):
    """Documents cannot be written as asked."""


def export(documents: Sequence[Document], path: Path, format: Format) -> dict[str, Any]:
    """Write documents to one file, with `<file>.manifest.json` beside it, and return the manifest.

    Parameters
    ----------
    documents : at least one.
    path : the file to write; replaced at once if it is there.
    format : "parquet" or "jsonl" (UTF-8, one object a line). Both hold id, language, group, title, text, and
        both can be read back with `load_corpus` when named after their language.

    Returns
    -------
    dict: file (name), format, languages, documents, characters, bytes, sha256.
    """
    entry = _write(documents, path, format)
    write_atomic(path.with_name(f"{path.name}.manifest.json"), _json(entry))
    return entry


def create_resource(
    corpus: Corpus,
    *,
    max_diff_percent: float,
    common: bool,
    vocab_size: int,
    out: Path,
    formats: Sequence[Format] = ("parquet", "jsonl"),
    seed: int = DATA_SEED,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> dict[str, Any]:
    """Make a split and token-balanced data set of a corpus and write it to the folder `out`.

    Topics are split first, the tokenizer is trained on the training split, and each split is balanced in its
    tokens (`balance.balance`). The folder holds `<split>/<language>.parquet` and `.jsonl`, `tokenizer/` and
    `manifest.json`; it appears when all of it is written.

    Parameters
    ----------
    max_diff_percent : no language has more than this many percent more tokens than the smallest, in any
        split.
    common : keep only topics that exist in every language, and cut long documents instead of dropping them.
    vocab_size : entries of the tokenizer at most.
    out : a folder that does not exist or is empty.
    seed : for the split and for which documents are chosen.

    Returns
    -------
    The manifest: settings, `difference_percent` asked and reached, a row of counts per split and language,
    and the SHA-256 and size of every file.

    Raises
    ------
    MomeError : one sentence, before anything is written.
    """
    if not formats or any(f not in FORMATS for f in formats):
        raise ExportError(f"The formats are {' and '.join(FORMATS)}, not {', '.join(formats) or 'none'}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(
            f"The output {out.name!r} exists and is not an empty folder; name a new one or empty it."
        )
    made = prepare(
        corpus,
        vocab_size=vocab_size,
        max_diff_percent=max_diff_percent,
        common=common,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    settings = {
        "max_diff_percent": max_diff_percent,
        "common": common,
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    with write_folder_atomic(out) as folder:
        for split, documents in made.after.items():
            for code in made.languages:
                mine = [d for d in documents if d.language == code]
                for kind in formats:
                    _write(mine, folder / split / f"{code}.{kind}", kind)
        made.tokenizer.save_pretrained(folder / "tokenizer")
        manifest = {
            "corpus": corpus.name,
            "corpus_fingerprint": corpus.fingerprint,
            "languages": list(corpus.languages),
            "settings": settings,
            "key": digest([corpus.fingerprint, corpus.languages, settings]),
            "difference_percent": {
                "asked": max_diff_percent,
                **{split: difference_percent(totals) for split, totals in made.tokens(made.after).items()},
            },
            "counts": _counts(made),
            "files": {
                path.relative_to(folder).as_posix(): {
                    "sha256": file_digest(path),
                    "bytes": path.stat().st_size,
                }
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        write_atomic(folder / "manifest.json", _json(manifest))
    return manifest


def _counts(made: Prepared) -> list[dict[str, Any]]:
    """A row for each split and language: what there was and what is kept."""
    before, after = made.tokens(made.before), made.tokens(made.after)
    rows = []
    for split, documents in made.after.items():
        for code in made.languages:
            mine = [d for d in documents if d.language == code]
            rows.append(
                {
                    "split": split,
                    "language": code,
                    "documents_before": sum(d.language == code for d in made.before[split]),
                    "documents": len(mine),
                    "characters": sum(len(d.text) for d in mine),
                    "bytes": sum(len(d.text.encode("utf-8")) for d in mine),
                    "tokens_before": before[split][code],
                    "tokens": after[split][code],
                }
            )
    return rows


def _write(documents: Sequence[Document], path: Path, format: str) -> dict[str, Any]:
    if not documents:
        raise ExportError("There is no document to export; choose another split or language.")
    frame = pd.DataFrame([[getattr(d, name) for name in FIELDS] for d in documents], columns=list(FIELDS))
    if format == "parquet":
        buffer = BytesIO()
        frame.to_parquet(buffer, index=False)
        write_atomic(path, buffer.getvalue())
    elif format == "jsonl":
        lines = (json.dumps(record, ensure_ascii=False) for record in frame.to_dict("records"))
        write_atomic(path, "\n".join(lines) + "\n")
    else:
        raise ExportError(f"The formats are {' and '.join(FORMATS)}, not {format!r}.")
    return {
        "file": path.name,
        "format": format,
        "languages": sorted({d.language for d in documents}),
        "documents": len(documents),
        "characters": sum(len(d.text) for d in documents),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
