"""Kinds of tokens, by rule: what a model forgets first can be told apart only once tokens have kinds.

The rules look at the text, not at the vocabulary, so they hold for any tokenizer and any language with spaces:

================  ======================================================================================
class             a character belongs to it if it is part of
================  ======================================================================================
``space``         white space (a token is one only if nothing else is in it)
``punctuation``   anything else that is no letter, digit or underscore
``number``        a word that begins with a digit
``keyword``       code: a reserved word of Python
``name``          code: any other identifier. Prose: a word with a capital letter that does not begin a
                  sentence (in German all nouns do)
``function_word``  prose: one of the language's most frequent words (see :func:`function_words`)
``word``          prose: any other word
================  ======================================================================================

Strings and comments in code are prose. A token belongs to the class of its first character that is no white space.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mome_utils.corpus import Document
from mome_utils.evaluation import LogitsFn, encode_documents, target_logprobs, window_batches

__all__ = ["CLASSES", "CODE", "byte_classes", "function_words", "score_classes", "token_classes"]

#: The classes, in the order of a figure.
CLASSES = ("keyword", "function_word", "word", "name", "number", "punctuation", "space")
#: Languages that are code.
CODE = frozenset({"py"})

_WORD = re.compile(r"\w+")
_QUOTED = re.compile(
    r'("""|\'\'\')(?:\\.|[^\\])*?(?:\1|\Z)|"(?:\\.|[^"\\\n])*"?|\'(?:\\.|[^\'\\\n])*\'?|#[^\n]*', re.DOTALL
)
_BEGINS = re.compile(r"(?:^|[.!?:\n])[\s\"'«»“”„‘’(\[]*\Z")
_KEYWORDS = frozenset(keyword.kwlist)


def function_words(texts: Sequence[str], count: int = 60) -> frozenset[str]:
    """The ``count`` most frequent words of some texts, in lower case, without those that begin with a digit.

    In every natural language these are articles, prepositions, pronouns and auxiliaries, with few exceptions (a
    corpus on one subject adds its noun). Ties are broken alphabetically.
    """
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(w.lower() for w in _WORD.findall(text) if not w[0].isdigit())
    return frozenset(sorted(seen, key=lambda w: (-seen[w], w))[:count])


def byte_classes(text: str, frequent: frozenset[str], *, code: bool) -> NDArray[np.int8]:
    """The class of each byte of a text in UTF-8, as an index into :data:`CLASSES`: ``[bytes]``.

    Args:
        text: a document.
        frequent: function words, in lower case.
        code: whether the text is Python.
    """
    classes = np.full(len(text), CLASSES.index("punctuation"), dtype=np.int8)
    classes[[i for i, c in enumerate(text) if c.isspace()]] = CLASSES.index("space")
    quoted = np.zeros(len(text), dtype=bool)
    if code:
        for match in _QUOTED.finditer(text):
            quoted[match.start() : match.end()] = True
    for match in _WORD.finditer(text):
        prose = not code or bool(quoted[match.start()])
        before = text[max(0, match.start() - 40) : match.start()]
        found = _class_of_word(match.group(), before, frequent, prose)
        classes[match.start() : match.end()] = CLASSES.index(found)
    widths = [len(c.encode()) for c in text]
    return np.repeat(classes, widths)


def _class_of_word(word: str, before: str, frequent: frozenset[str], prose: bool) -> str:
    if word[0].isdigit():
        return "number"
    if not prose:
        return "keyword" if word in _KEYWORDS else "name"
    if word.lower() in frequent:
        return "function_word"
    return "name" if word[0].isupper() and not _BEGINS.search(before) else "word"


def token_classes(widths: Sequence[int], classes: NDArray[np.int8]) -> NDArray[np.int8]:
    """The class of each token: that of its first byte that is no white space, ``[tokens]``.

    Args:
        widths: bytes of each token, which together are the text.
        classes: of the text's bytes.
    """
    space = CLASSES.index("space")
    ends = np.cumsum(widths)
    found = np.full(len(widths), space, dtype=np.int8)
    for i, (end, width) in enumerate(zip(ends, widths, strict=True)):
        inside = classes[end - width : end]
        solid = inside[inside != space]
        if len(solid):
            found[i] = solid[0]
    return found


def score_classes(
    model: PreTrainedModel | LogitsFn, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document],
    frequent: Mapping[str, frozenset[str]], *, block_size: int, stride: int, batch_size: int = 32,
) -> pd.DataFrame:
    """Loss of each document under a model, by class of token; summed over classes it is ``score_documents``' loss.

    Args:
        model, block_size, stride, batch_size: as in :func:`mome_utils.evaluation.score_documents`.
        frequent: language → its function words.

    Returns:
        A row per document and class that occurs in it: language, document, token_class, nats, bytes, tokens.
    """
    sequences = encode_documents(tokenizer, documents)
    kinds, widths = [], []
    for document, ids in zip(documents, sequences, strict=True):
        own = [len(token) for token in tokenizer.convert_ids_to_tokens(ids[1:])]
        of_bytes = byte_classes(document.text, frequent[document.language], code=document.language in CODE)
        kinds.append(token_classes(own, of_bytes))
        widths.append(np.array(own))
    sums = np.zeros((len(documents), len(CLASSES), 3))
    reached = np.zeros(len(documents), dtype=int)
    with torch.inference_mode():
        # Windows come longest first and equal ones in order; only a document's last is shorter: so in document order.
        for batch in window_batches(tokenizer, documents, block_size, stride, batch_size):
            losses = -target_logprobs(model, batch).double().numpy()
            owners, rows = batch.target_owners.numpy(), batch.rows.numpy()
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows)) + 1):
                owner = owners[part[0]]
                place = slice(reached[owner], reached[owner] + len(part))
                values = np.stack([losses[part], widths[owner][place], np.ones(len(part))], axis=1)
                np.add.at(sums[owner], kinds[owner][place], values)
                reached[owner] += len(part)
    return pd.DataFrame([
        {"language": document.language, "document": document.id, "token_class": CLASSES[k],
         "nats": row[0], "bytes": int(row[1]), "tokens": int(row[2])}
        for document, table in zip(documents, sums, strict=True) for k, row in enumerate(table) if row[2]
    ])
