"""The study's shared tokenizer and what one wants to know about a tokenizer.

Byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019): any text can be written, nothing is
lost, so bits per byte can be computed and no language is shut out. Special tokens as in the MoME paper:
`<unk> <s> </s>`, padding with `</s>`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class TokenizerError(MomeError):
    """A tokenizer that cannot be trained."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    The vocabulary may come out smaller than asked when the texts are few. Nothing is added when encoding: the
    packing writes `<s>` and `</s>` itself. A text that spells `<s>` is text, not the special token.

    Raises
    ------
    TokenizerError : `vocab_size` below the 256 bytes and 3 special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"vocab_size is {vocab_size} but a byte-level vocabulary has at least "
            f"{SMALLEST_VOCABULARY} entries; raise it."
        )
    backend = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return ids


def token_counts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """Tokens of each text as the packing writes it, with its `<s>` and `</s>`."""
    return [len(ids) + 2 for ids in encode(tokenizer, texts)]


class TokenReader:
    """Tokens of texts, each text read once: what was read is remembered.

    Parameters
    ----------
    tokenizer : as `train_tokenizer` makes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, NDArray[np.int32]] = {}

    def ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, without special tokens."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        for text, ids in zip(new, encode(self.tokenizer, new), strict=True):
            self._known[text] = np.array(ids, dtype=np.int32)
        return [self._known[text] for text in texts]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """As `token_counts`: with the `<s>` and `</s>` of each text."""
        return [len(ids) + 2 for ids in self.ids(texts)]

    def prefix_counts(self, texts: Sequence[str], ends: Sequence[Sequence[int]]) -> list[list[int]]:
        """`token_counts` of ``text[:end]`` for every end of every text; each text is read once.

        A byte-level tokenizer cuts a text into words from left to right and then merges bytes within each word.
        Where it cuts depends on at most one character behind the word that follows, so all words but the last
        two of a prefix are the whole text's, and only those two are tokenized again.

        Parameters
        ----------
        ends : for each text, lengths in characters, up to the text's own.
        """
        if not texts:
            return []
        read = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False).encodings
        before: list[int] = []
        tails: list[str] = []
        for text, own, encoding in zip(texts, ends, read, strict=True):
            self._known[text] = np.array(encoding.ids, dtype=np.int32)
            for end in own:
                word = encoding.char_to_word(end - 1) if end else 0
                start = encoding.word_to_chars(word - 1)[0] if word else 0
                before.append(encoding.word_to_tokens(word - 1)[0] if word else 0)
                tails.append(text[start:end])
        counted = (a + b for a, b in zip(before, self.counts(tails), strict=True))
        return [[next(counted) for _ in own] for own in ends]


def coverage(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> dict[str, Any]:
    """How well a tokenizer covers the characters of some texts.

    Returns
    -------
    dict with `characters` (occurrences), `distinct` (different characters), `covered` (share of occurrences
    that encode and decode to themselves without `<unk>`; 1.0 for any byte-level tokenizer), `single_token`
    and `single_token_distinct` (shares, of occurrences and of different characters, that are one token when
    alone), and `split` (the commonest characters that need more than one token).
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    characters = sorted(counts, key=lambda c: (-counts[c], c))
    encoded = encode(tokenizer, characters)
    total = max(1, sum(counts.values()))
    covered = single = single_distinct = 0
    split: list[str] = []
    for character, ids in zip(characters, encoded, strict=True):
        if tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == character:
            covered += counts[character]
        if len(ids) == 1:
            single += counts[character]
            single_distinct += 1
        else:
            split.append(character)
    return {
        "characters": sum(counts.values()),
        "distinct": len(characters),
        "covered": covered / total,
        "single_token": single / total,
        "single_token_distinct": single_distinct / max(1, len(characters)),
        "split": "".join(split[:12]),
    }


def fertility(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> pd.DataFrame:
    """How many tokens a text costs, per language.

    Returns
    -------
    DataFrame: language, tokens (no special tokens), bytes (UTF-8), words (separated by white space: of little
    use for scripts that do not write spaces), bytes_per_token, tokens_per_word.
    """
    rows = []
    for language in dict.fromkeys(d.language for d in documents):
        texts = [d.text for d in documents if d.language == language]
        tokens = sum(len(ids) for ids in encode(tokenizer, texts))
        size = sum(len(t.encode("utf-8")) for t in texts)
        words = sum(len(t.split()) for t in texts)
        rows.append((language, tokens, size, words, size / tokens, tokens / words))
    columns = ["language", "tokens", "bytes", "words", "bytes_per_token", "tokens_per_word"]
    return pd.DataFrame(rows, columns=columns)


def encode_speed(
    tokenizers: Mapping[str, PreTrainedTokenizerFast], documents: Sequence[Document], *, repeats: int = 5
) -> pd.DataFrame:
    """Encoding speed per tokenizer and language, the fastest of interleaved repeats (as `timeit` advises).

    Time is processor time of all threads, so other work on the machine disturbs it little.

    Returns
    -------
    DataFrame: tokenizer, language, megabytes_per_second (UTF-8 bytes per second of processor time), ratio (to
    the first tokenizer, on the same texts in the same process; the only number worth comparing across
    machines).
    """
    languages = list(dict.fromkeys(d.language for d in documents))
    texts = {code: [d.text for d in documents if d.language == code] for code in languages}
    seconds: dict[tuple[str, str], list[float]] = {(n, c): [] for n in tokenizers for c in languages}
    for repeat in range(repeats + 1):
        for (name, code), times in seconds.items():
            started = time.process_time()
            encode(tokenizers[name], texts[code])
            if repeat:  # the first round only warms up
                times.append(time.process_time() - started)
    rows = []
    first = next(iter(tokenizers))
    for (name, code), times in seconds.items():
        size = sum(len(t.encode("utf-8")) for t in texts[code]) / 1e6
        rows.append((name, code, size / min(times), min(seconds[first, code]) / min(times)))
    return pd.DataFrame(rows, columns=["tokenizer", "language", "megabytes_per_second", "ratio"])
