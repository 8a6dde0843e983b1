"""Reading the study's data set back from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mome_utils.artifacts import DamagedArtifact
from mome_utils.balance import SPLITS
from mome_utils.config import MomeError
from mome_utils.corpus import Document

__all__ = ["DataError", "StudyData"]


class DataError(MomeError):
    """A data set that cannot be made or read."""


class StudyData:
    """The study's data set as it lies on disk. Reading is lazy and cached, blocks are memory-mapped."""

    def __init__(self, path: Path, summary: Mapping[str, Any]) -> None:
        self.path = path
        self.summary = summary
        self.fingerprint: str = summary["fingerprint"]
        self.languages: tuple[str, ...] = tuple(summary["languages"])
        self.block_size: int = summary["settings"]["block_size"]
        #: Number of tokens of the trained tokenizer: the width of a model's output.
        self.vocab_size: int = summary["vocabulary"]
        self._arrays: dict[tuple[str, str], NDArray[np.int32]] = {}

    @classmethod
    def load(cls, path: Path) -> StudyData:
        """Open the data set in a folder; `DamagedArtifact` when it is not whole, `DataError` when there is
        none.
        """
        if not path.is_dir():
            raise DataError("There is no data set here; run notebooks/01_dataset_creation.ipynb first.")
        try:
            summary = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
            data = cls(path, summary)
        except (OSError, ValueError, KeyError, TypeError):
            raise _damaged("dataset.json") from None
        for part in ("tokenizer", "documents.parquet", *(f"blocks/{key}" for key in summary["block_sha256"])):
            if not (path / part).exists():
                raise _damaged(part)
        return data

    def verify(self) -> None:
        """Read every block again and compare with the recorded hash; `DamagedArtifact` at the first
        difference.
        """
        for key, expected in self.summary["block_sha256"].items():
            split, language = key.split("/", 1)
            found = hashlib.sha256(self.block_array(split, language).astype("<i4").tobytes()).hexdigest()
            if found != expected:
                raise _damaged(f"blocks/{key}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The shared tokenizer."""
        return PreTrainedTokenizerFast.from_pretrained(self.path / "tokenizer")

    @cached_property
    def table(self) -> pd.DataFrame:
        """The balanced documents: id, language, group, title, text, split, tokens."""
        try:
            return pd.read_parquet(self.path / "documents.parquet")
        except (pyarrow.ArrowInvalid, OSError):
            raise _damaged("documents.parquet") from None

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """A row for each split and language: documents, characters and tokens before and after balancing,
        blocks.
        """
        return pd.DataFrame(self.summary["statistics"])

    @cached_property
    def _documents(self) -> dict[tuple[str, str], list[Document]]:
        groups: dict[tuple[str, str], list[Document]] = {(s, c): [] for s in SPLITS for c in self.languages}
        for row in self.table.itertuples(index=False):
            document = Document(row.id, row.language, row.group, row.title, row.text)
            groups[row.split, row.language].append(document)
        return groups

    def documents(self, split: str | None = None, language: str | None = None) -> list[Document]:
        """The balanced documents of a split and a language; None means all of them."""
        self._check(split, language)
        return [
            document
            for (s, code), documents in self._documents.items()
            if split in (None, s) and language in (None, code)
            for document in documents
        ]

    def blocks(self, split: str, language: str) -> datasets.Dataset:
        """Memory-mapped blocks: `input_ids` int32 [block_size] and `documents`, the ids of the texts in
        each.
        """
        self._check(split, language)
        try:
            return datasets.load_from_disk(str(self.path / "blocks" / split / language))
        except (pyarrow.ArrowInvalid, OSError, ValueError):
            raise _damaged(f"blocks/{split}/{language}") from None

    def block_array(self, split: str, language: str) -> NDArray[np.int32]:
        """All blocks of a language as int32 [blocks, block_size], read-only, mapped from disk where
        possible.
        """
        key = (split, language)
        if key not in self._arrays:
            column = self.blocks(split, language).data.column("input_ids")
            chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
            flat = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
            array = flat.reshape(-1, self.block_size)
            array.flags.writeable = False
            self._arrays[key] = array
        return self._arrays[key]

    def blocks_of_groups(self, split: str, language: str, groups: Sequence[str]) -> NDArray[np.int64]:
        """Indices of the blocks whose documents all belong to the given topic groups, ascending.

        `DataError` for a group that no document has, or where no block is left.
        """
        group_of = dict(zip(self.table["id"], self.table["group"], strict=True))
        unknown = sorted(set(groups) - set(group_of.values()))
        if unknown:
            raise DataError(f"No document belongs to the topic group {unknown[0]!r}; use groups of the data set.")
        wanted = set(groups)
        documents = self.blocks(split, language)["documents"]
        found = [i for i, ids in enumerate(documents) if all(group_of[key] in wanted for key in ids)]
        if not found:
            raise DataError(f"No {split} block of {language} holds the chosen topic groups alone; choose more groups.")
        return np.array(found, dtype=np.int64)

    def lengths(self, split: str) -> dict[str, int]:
        """Language -> number of blocks, in the order of the languages: what `schedules.schedule` wants."""
        return {code: len(self.block_array(split, code)) for code in self.languages}

    def _check(self, split: str | None, language: str | None) -> None:
        if split is not None and split not in SPLITS:
            raise DataError(f"There is no split {split!r}; use {', '.join(SPLITS)}.")
        if language is not None and language not in self.languages:
            raise DataError(f"The data set has no language {language!r}; it has {', '.join(self.languages)}.")


def _damaged(part: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"The data set is damaged ({part} is missing or cannot be read as written); "
        "delete its folder and run notebooks/01_dataset_creation.ipynb again."
    )
