"""The router: which language a sequence of token ids is in, decided from a bag of those ids.

The published router (MoME, arXiv 2407.19610) writes token ids as words, takes TF-IDF features of them and
fits a linear classifier. :class:`TokenTfidf` computes those features straight from the ids, and
:class:`TokenRouter` is the fitted pipeline as a tensor module: same logits, same decisions, batched, one
decision per sequence, and saved as safetensors and JSON, so that loading a router can never run code.

Shapes: ``n`` sequences, ``V`` token ids, ``L`` languages, ``F`` features (the ids that the vectorizer keeps).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from mome_utils.artifacts import DamagedArtifact, file_digest, write_atomic
from mome_utils.config import MomeError

__all__ = [
    "AS_MEANT_PATTERN", "PUBLISHED_PATTERN", "TokenRouter", "TokenTfidf", "count_tokens", "fit_router",
    "labelled", "top_features", "words",
]

#: Every id is a word.
AS_MEANT_PATTERN = r"\S+"
#: scikit-learn's default, which the release uses: a word has two characters or more, so ids 0 to 9 are lost.
PUBLISHED_PATTERN = r"(?u)\b\w\w+\b"

_FORMAT = "mome-token-router"


def words(sequences: Sequence[Any]) -> list[str]:
    """Each sequence of token ids as a text of numbers, the form in which the release hands them to TF-IDF.

    Example:
        >>> words([[7, 12], []])
        ['7 12', '']
    """
    return [" ".join(str(int(token)) for token in sequence) for sequence in sequences]


def count_tokens(sequences: Sequence[Any], vocab_size: int) -> sp.csr_matrix:
    """How often each id occurs in each sequence.

    Args:
        sequences: ``n`` sequences of ids (a list of lists or arrays of any lengths, or one array [n, T]).
        vocab_size: ``V``.

    Returns:
        Sparse counts [n, V], float64.

    Raises:
        MomeError: an id is negative or not below ``vocab_size``.
    """
    rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    ids = np.concatenate([np.empty(0, np.int64), *rows])
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise MomeError(
            f"A token id lies outside the router's vocabulary of {vocab_size} ids: "
            "use the tokenizer that the router was fitted with."
        )
    starts = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    counts = sp.csr_matrix((np.ones(ids.size), ids, starts), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts


class TokenTfidf(TransformerMixin, BaseEstimator):
    """TF-IDF of token counts, equal to scikit-learn's ``TfidfVectorizer`` on the ids written as words.

    Term counts times ``idf(t) = ln((1 + n) / (1 + df(t))) + 1``, scaled to Euclidean length 1; ids never seen
    while fitting are ignored, as the vectorizer ignores unknown words.

    Args:
        published_tokens: leave out the ids 0 to 9, as the release's token pattern does without saying so.

    Attributes:
        vocab_size_: ``V``. tokens_: ids of the features, ascending [F]. idf_: their weights [F].
    """

    def __init__(self, *, published_tokens: bool = False) -> None:
        self.published_tokens = published_tokens

    def fit(self, counts: sp.csr_matrix, y: Any = None) -> Self:
        """Learn the document frequencies from counts [n, V]."""
        seen = np.flatnonzero(counts.getnnz(axis=0))
        self.tokens_ = seen[seen >= 10] if self.published_tokens else seen
        self.vocab_size_ = counts.shape[1]
        self.idf_ = TfidfTransformer().fit(counts[:, self.tokens_]).idf_
        return self

    def transform(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Counts [n, V] to features [n, F]; a sequence with no known id gives a row of zeros."""
        return normalize(counts[:, self.tokens_].multiply(self.idf_).tocsr(), norm="l2", copy=False)


def labelled(blocks: Mapping[str, Sequence[Any]], vocab_size: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Token counts of all languages' sequences, in the mapping's order, and the index of each one's language.

    Returns:
        Counts [n, V] and labels [n] (int64).
    """
    counts = sp.vstack([count_tokens(sequences, vocab_size) for sequences in blocks.values()]).tocsr()
    return counts, np.repeat(np.arange(len(blocks)), [len(sequences) for sequences in blocks.values()])


class TokenRouter(nn.Module):
    """TF-IDF and a linear classifier over token ids, as tensors.

    With counts ``c`` of a sequence, ``logits = weight · (c ∘ idf) / ‖c ∘ idf‖ + bias``. The norm is over
    *distinct* ids, so it is not a sum over tokens and the counts have to be made first. Ids that the
    vectorizer dropped or never saw have ``idf = 0`` and change nothing. A sequence without any known id
    (empty, all padding) has no direction: its logits are ``bias``, which is also what scikit-learn answers.

    All numbers are float64 buffers: they travel in the state dict of a model that owns a router, and they
    stay float64 when that model is cast to a smaller type (a router in bfloat16 would decide differently).
    On Apple's MPS, which has no float64, they become float32.

    Args:
        vocab_size: number of token ids, ``V``.
        languages: names of the rows, at least two different ones.

    Attributes:
        idf: [V]. weight: [L, V]. bias: [L]. languages: the names, in the order of the logits.

    Example:
        >>> router = TokenRouter(8, ("en", "fr"))
        >>> router(torch.tensor([[3, 3, 5]])).shape
        torch.Size([1, 2])
    """

    idf: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, vocab_size: int, languages: Sequence[str]) -> None:
        super().__init__()
        if len(set(languages)) != len(languages) or len(languages) < 2:
            raise MomeError(f"A router needs two or more different languages, not {list(languages)}.")
        if vocab_size < 1:
            raise MomeError(f"A router needs a vocabulary of one id or more, not {vocab_size}.")
        self.languages = tuple(languages)
        self.vocab_size = vocab_size
        self.register_buffer("idf", torch.zeros(vocab_size, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(len(self.languages), vocab_size, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(len(self.languages), dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Follow moves between devices, ignore changes of number type (see the class)."""
        device = fn(torch.empty(0, device=self.idf.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = (
                    torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(dtype).to(device)
                )
        return self

    @classmethod
    def from_sklearn(
        cls, vectorizer: TokenTfidf | TfidfVectorizer, model: Any, languages: Sequence[str], *,
        vocab_size: int | None = None,
    ) -> TokenRouter:
        """Compile a fitted scikit-learn pipeline.

        Args:
            vectorizer: a fitted :class:`TokenTfidf`, or a fitted ``TfidfVectorizer`` over :func:`words`.
            model: a fitted linear classifier with ``coef_`` and ``intercept_``.
            languages: the name of each of ``model.classes_``, in that order.
            vocab_size: needed for a ``TfidfVectorizer``, which does not know it.

        For two languages scikit-learn keeps one row with decision value ``d``; the router's rows are then
        ``-d/2`` and ``d/2``: their difference is ``d``, their argmax the model's decision, their softmax the
        probabilities of logistic regression.

        Raises:
            MomeError: not a linear model, other features than the published ones, or names that do not fit.
        """
        if isinstance(vectorizer, TfidfVectorizer):
            plain = vectorizer.norm == "l2" and vectorizer.use_idf and not vectorizer.sublinear_tf
            if not plain or vectorizer.binary or vectorizer.ngram_range != (1, 1) or vocab_size is None:
                raise MomeError(
                    "A TfidfVectorizer becomes a router only as plain TF-IDF of single ids with L2 norm: "
                    "leave its options at their defaults and give vocab_size."
                )
            tokens = np.array([int(word) for word in vectorizer.get_feature_names_out()], dtype=np.int64)
        else:
            tokens, vocab_size = vectorizer.tokens_, int(vectorizer.vocab_size_)
        if not hasattr(model, "coef_"):
            raise MomeError(
                f"A router is compiled from a linear classifier, which {type(model).__name__} is not: "
                "choose logistic regression, SGD or a linear SVM."
            )
        if len(languages) != len(model.classes_):
            raise MomeError(
                f"The classifier knows {len(model.classes_)} classes, but {len(languages)} names were given: "
                "name each of model.classes_ in its order."
            )
        rows = np.asarray(model.coef_, float)
        bias = np.broadcast_to(model.intercept_, len(rows)).astype(float)
        if len(rows) == 1:
            rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
        router = cls(vocab_size, languages)
        router.idf[tokens] = torch.from_numpy(np.asarray(vectorizer.idf_, float))
        router.weight[:, tokens] = torch.from_numpy(rows)
        router.bias.copy_(torch.from_numpy(bias))
        return router

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of each sequence.

        Args:
            input_ids: int64 [B, T], ids in 0 … V-1; T may be 0.
            attention_mask: [B, T], 0 where a position does not count (padding); ``None`` counts all.

        Returns:
            [B, L] float64: scikit-learn's ``decision_function``.
        """
        counted = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0)
        features = self.idf.new_zeros(input_ids.shape[0], self.vocab_size)
        features.scatter_add_(1, input_ids, counted.to(features.dtype))
        features.mul_(self.idf)
        norm = features.norm(dim=1, keepdim=True)
        return (features @ self.weight.T) / torch.where(norm > 0, norm, 1.0) + self.bias

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Index into ``languages`` for each sequence, int64 [B]; the first wins a tie, as in scikit-learn."""
        return self(input_ids, attention_mask).argmax(dim=1)

    def save(self, folder: Path | str) -> None:
        """Write ``router.safetensors`` (the three buffers) and ``router.json`` (names, sizes, its hash)."""
        folder = Path(folder)
        tensors = {name: buffer.detach().cpu().contiguous() for name, buffer in self.state_dict().items()}
        write_atomic(folder / "router.safetensors", safetensors.torch.save(tensors))
        description = {
            "format": _FORMAT, "version": 1, "languages": list(self.languages), "vocab_size": self.vocab_size,
            "sha256": file_digest(folder / "router.safetensors"),
        }
        write_atomic(folder / "router.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> TokenRouter:
        """Read what :meth:`save` wrote. Nothing in the files is ever executed.

        Raises:
            DamagedArtifact: a file is missing, cut short, changed, of another format, or the two do not fit.
        """
        folder = Path(folder)
        described, weights = folder / "router.json", folder / "router.safetensors"
        for file in (described, weights):
            if not file.is_file():
                raise _unreadable(file, "it is missing")
        try:
            facts = json.loads(described.read_text(encoding="utf-8"))
        except ValueError:
            raise _unreadable(described, "it is not JSON") from None
        if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (_FORMAT, 1):
            raise _unreadable(described, f"it does not describe a '{_FORMAT}' of version 1")
        languages, vocab_size = facts.get("languages"), facts.get("vocab_size")
        if not isinstance(languages, list) or not all(isinstance(name, str) for name in languages):
            raise _unreadable(described, "its languages are not a list of names")
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
            raise _unreadable(described, "its vocab_size is not a whole number")
        if file_digest(weights) != facts.get("sha256"):
            raise _unreadable(weights, "it is damaged or not the one that router.json names")
        try:
            tensors = safetensors.torch.load(weights.read_bytes())
        except safetensors.SafetensorError:
            raise _unreadable(weights, "it is not a safetensors file") from None
        shapes = {"idf": (vocab_size,), "weight": (len(languages), vocab_size), "bias": (len(languages),)}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise _unreadable(weights, f"it does not fit {len(languages)} languages and {vocab_size} ids")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
            raise _unreadable(weights, "its tensors are not finite numbers")
        router = cls(vocab_size, languages)
        router.load_state_dict(tensors)
        return router


def _unreadable(file: Path, why: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"The router file {file.parent.name}/{file.name} cannot be used, {why}: "
        "fit the router again with notebook 04."
    )


def fit_router(
    blocks: Mapping[str, Sequence[Any]], vocab_size: int, *, model: Any = None, published_tokens: bool = False
) -> TokenRouter:
    """Fit TF-IDF and a linear classifier and compile them.

    Args:
        blocks: token sequences of each language; the mapping's order becomes the order of the logits.
        vocab_size: ``V``.
        model: an unfitted linear scikit-learn classifier; logistic regression with its defaults when absent.
        published_tokens: as in :class:`TokenTfidf`.

    Raises:
        MomeError: fewer than two languages, or a language without a sequence.
    """
    empty = [language for language, sequences in blocks.items() if not len(sequences)]
    if len(blocks) < 2 or empty:
        raise MomeError(
            f"A router cannot be fitted without text for {', '.join(empty)}: give it longer documents."
            if empty else "A router needs the text of two or more languages."
        )
    counts, labels = labelled(blocks, vocab_size)
    vectorizer = TokenTfidf(published_tokens=published_tokens).fit(counts)
    classifier = LogisticRegression(max_iter=1000) if model is None else model
    classifier.fit(vectorizer.transform(counts), labels)
    return TokenRouter.from_sklearn(vectorizer, classifier, tuple(blocks))


def top_features(router: TokenRouter, tokenizer: Any, n: int = 10) -> pd.DataFrame:
    """The ids that speak most strongly for each language, decoded.

    Args:
        router: a fitted router.
        tokenizer: the transformers tokenizer whose ids it reads.
        n: ids per language.

    Returns:
        Rows (language, rank, token, text, weight), by falling weight; bytes that are no text alone are shown
        in the tokenizer's own spelling.
    """
    rows = []
    for language, weights in zip(router.languages, router.weight, strict=True):
        known = torch.where(router.idf > 0, weights, -torch.inf)
        best = known.topk(min(n, int((router.idf > 0).sum())))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for rank, (token, weight) in enumerate(pairs, start=1):
            text = tokenizer.decode([token])
            if "\ufffd" in text:
                text = tokenizer.convert_ids_to_tokens(token)
            rows.append({"language": language, "rank": rank, "token": token, "text": text, "weight": weight})
    return pd.DataFrame(rows)
