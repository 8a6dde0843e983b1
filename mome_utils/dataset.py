"""From a corpus to the study's data: split, tokenizer, balance, blocks (`study_data` reads them back).

The order matters. Topics are split before anything else, the tokenizer sees the training split only, and
balancing comes last, in tokens of that tokenizer, in each split by itself (each pair of languages is then
within the bound in every split, and so in their sum).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerFast

from mome_utils.artifacts import digest, write_atomic, write_folder_atomic
from mome_utils.balance import (
    SPLITS,
    balance,
    common_only,
    difference_percent,
    language_sets,
    seeded_order,
    split_topics,
)
from mome_utils.config import Profile
from mome_utils.corpus import Corpus, Document
from mome_utils.duplicates import near_duplicates
from mome_utils.study_data import DataError, StudyData
from mome_utils.tokenization import TokenReader, encode, train_tokenizer

__all__ = [
    "DataError",
    "Prepared",
    "StudyData",
    "balance",
    "build_dataset",
    "near_duplicates",
    "pack",
    "pack_all",
    "prepare",
    "split_topics",
]

#: The data set has one seed of its own; the seeds of the study concern models and the order of their batches.
DATA_SEED = 0


@dataclass(frozen=True)
class Prepared:
    """Documents by split before and after balancing, and the tokenizer: what the data set is packed from."""

    tokenizer: PreTrainedTokenizerFast
    reader: TokenReader
    before: Mapping[str, Sequence[Document]]
    after: Mapping[str, Sequence[Document]]
    languages: tuple[str, ...]

    def tokens(self, which: Mapping[str, Sequence[Document]]) -> dict[str, dict[str, int]]:
        """Split -> language -> tokens, `<s>` and `</s>` of every document included."""
        return {
            split: {
                code: sum(self.reader.counts([d.text for d in documents if d.language == code]))
                for code in self.languages
            }
            for split, documents in which.items()
        }


def prepare(
    corpus: Corpus,
    *,
    vocab_size: int,
    max_diff_percent: float,
    common: bool,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = DATA_SEED,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Prepared:
    """Split by topic, train the tokenizer on the training split, balance each split in its tokens.

    `tokenizer` is used instead of a trained one where it is given.

    With `common`, topics that lack a language are left out at the very start. Raises `BalanceError`,
    `SplitError` or `DataError` (a split without documents of some language).
    """
    documents = common_only(corpus.documents) if common else list(corpus.documents)
    assigned = split_topics(
        (d.id for d in documents), validation_fraction, test_fraction, seed, strata=language_sets(documents)
    )
    before = {split: [d for d in documents if assigned[d.id] == split] for split in SPLITS}
    for split, members in before.items():
        missing = [code for code in corpus.languages if code not in {d.language for d in members}]
        if missing:
            raise DataError(
                f"The {split} split has no document of {', '.join(missing)}; add documents of that language."
            )
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in before["train"]), vocab_size)
    reader = TokenReader(tokenizer)
    after = {
        split: balance(
            members, reader.counts, max_diff_percent, common=common, seed=seed,
            count_prefixes=reader.prefix_counts,
        )
        for split, members in before.items()
    }
    return Prepared(tokenizer, reader, before, after, corpus.languages)


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, block_size: int
) -> tuple[NDArray[np.int32], list[list[str]]]:
    """Lay documents end to end as `<s> text </s>` and cut the stream into blocks.

    Returns
    -------
    (int32 [blocks, block_size], the ids of the documents that each block touches, in order). The last block
    is dropped when it is not full.
    """
    return _blocks(documents, encode(tokenizer, [d.text for d in documents]), tokenizer, block_size)


def _blocks(
    documents: Sequence[Document], ids: Sequence[ArrayLike], tokenizer: PreTrainedTokenizerFast, block_size: int
) -> tuple[NDArray[np.int32], list[list[str]]]:
    """`pack` of documents whose token ids are known."""
    bos, eos = ([token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    streams = [np.concatenate([bos, own, eos]).astype(np.int32) for own in ids]
    owner = np.repeat(np.arange(len(documents)), [len(stream) for stream in streams])
    flat = np.concatenate([np.empty(0, dtype=np.int32), *streams])
    count = len(flat) // block_size
    blocks = flat[: count * block_size].reshape(count, block_size)
    owners = owner[: count * block_size].reshape(count, block_size)
    names = [[documents[i].id for i in range(row[0], row[-1] + 1)] for row in owners]
    return blocks, names


def build_dataset(corpus: Corpus, profile: Profile, out: Path) -> None:
    """Make the study's data set in the folder `out`, which appears at once when everything is written.

    Contents: `tokenizer/`; `documents.parquet` (id, language, group, title, text, split, tokens) with the
    balanced documents; `blocks/<split>/<language>/` (Arrow: input_ids int32 [block_size], documents list of
    ids); `dataset.json` (fingerprint, settings, statistics before and after balancing).

    Raises
    ------
    MomeError : one sentence, when the corpus cannot be split, balanced or packed as the profile asks.
    """
    settings = {
        "vocab_size": profile.vocab_size,
        "block_size": profile.block_size,
        "validation_fraction": profile.validation_fraction,
        "test_fraction": profile.test_fraction,
        "max_diff_percent": profile.max_diff_percent,
        "common_documents": profile.common_documents,
        "seed": DATA_SEED,
    }
    made = prepare(
        corpus,
        vocab_size=profile.vocab_size,
        max_diff_percent=profile.max_diff_percent,
        common=profile.common_documents,
        validation_fraction=profile.validation_fraction,
        test_fraction=profile.test_fraction,
    )
    packed = pack_all(made, profile.block_size)
    hashes = {
        f"{split}/{code}": hashlib.sha256(blocks.astype("<i4").tobytes()).hexdigest()
        for (split, code), (blocks, _) in packed.items()
    }
    fingerprint = digest(
        {
            "corpus": corpus.fingerprint,
            "languages": corpus.languages,
            "settings": settings,
            "tokenizer": made.tokenizer.backend_tokenizer.to_str(),
            "documents": {
                split: [(d.language, d.id, d.text) for d in docs] for split, docs in made.after.items()
            },
            "blocks": hashes,
        }
    )
    with write_folder_atomic(out) as folder:
        made.tokenizer.save_pretrained(folder / "tokenizer")
        _documents_table(made).to_parquet(folder / "documents.parquet", index=False)
        for (split, code), (blocks, names) in packed.items():
            _save_blocks(blocks, names, folder / "blocks" / split / code)
        summary = {
            "fingerprint": fingerprint,
            "corpus": corpus.name,
            "corpus_fingerprint": corpus.fingerprint,
            "languages": list(corpus.languages),
            "settings": settings,
            "vocabulary": len(made.tokenizer),
            "block_sha256": hashes,
            "statistics": _statistics(made, packed),
        }
        write_atomic(folder / "dataset.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


# --- parts of build_dataset ---


def pack_all(
    made: Prepared, block_size: int
) -> dict[tuple[str, str], tuple[NDArray[np.int32], list[list[str]]]]:
    """The blocks of every split and language, documents in an order drawn from the seed: see `pack`."""
    packed = {}
    for split, documents in made.after.items():
        for code in made.languages:
            mine = {d.id: d for d in documents if d.language == code}
            order = seeded_order(mine, DATA_SEED, f"pack {code}")
            chosen = [mine[key] for key in order]
            ids = made.reader.ids([d.text for d in chosen])
            packed[split, code] = _blocks(chosen, ids, made.tokenizer, block_size)
            if not len(packed[split, code][0]):
                raise DataError(
                    f"The {split} split of {code!r} holds less than one block of {block_size} tokens; "
                    "use more documents or a smaller block_size."
                )
    return packed


def _documents_table(made: Prepared) -> pd.DataFrame:
    rows = []
    for split, documents in made.after.items():
        counts = made.reader.counts([d.text for d in documents])
        rows += [
            (d.id, d.language, d.group, d.title, d.text, split, tokens)
            for d, tokens in zip(documents, counts, strict=True)
        ]
    return pd.DataFrame(rows, columns=["id", "language", "group", "title", "text", "split", "tokens"])


def _save_blocks(blocks: NDArray[np.int32], names: list[list[str]], folder: Path) -> None:
    """One Arrow table per language and split; one record batch, so that it maps to one array."""
    width = blocks.shape[1]
    values = pyarrow.array(blocks.reshape(-1), type=pyarrow.int32())
    table = pyarrow.table(
        {
            "input_ids": pyarrow.FixedSizeListArray.from_arrays(values, width),
            "documents": pyarrow.array(names, type=pyarrow.list_(pyarrow.string())),
        }
    )
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32"), length=width),
            "documents": datasets.List(datasets.Value("string")),
        }
    )
    dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    with _silent_progress():
        dataset.save_to_disk(folder, num_shards=1)


@contextmanager
def _silent_progress() -> Iterator[None]:
    """`datasets` draws a progress bar for every table saved; dozens of them say nothing."""
    was_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not was_off:
        datasets.enable_progress_bars()


def _statistics(
    made: Prepared, packed: Mapping[tuple[str, str], tuple[NDArray[np.int32], list[list[str]]]]
) -> list[dict[str, Any]]:
    before, after = made.tokens(made.before), made.tokens(made.after)
    rows = []
    for split in SPLITS:
        texts = {(d.language, d.id): d.text for d in made.before[split]}
        for code in made.languages:
            old = [d for d in made.before[split] if d.language == code]
            new = [d for d in made.after[split] if d.language == code]
            rows.append(
                {
                    "split": split,
                    "language": code,
                    "documents_before": len(old),
                    "documents": len(new),
                    "cut": sum(len(d.text) < len(texts[code, d.id]) for d in new),
                    "characters_before": sum(len(d.text) for d in old),
                    "characters": sum(len(d.text) for d in new),
                    "tokens_before": before[split][code],
                    "tokens": after[split][code],
                    "blocks": len(packed[split, code][0]),
                    "difference_percent_before": difference_percent(before[split]),
                    "difference_percent": difference_percent(after[split]),
                }
            )
    return rows
