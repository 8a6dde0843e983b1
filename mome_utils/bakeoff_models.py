"""What enters the router's bake-off: features of token ids, classifiers of them, and their size on disk.

A *set of features* has a part without memory (:attr:`Features.extract`: counts of each sequence, the same for
every fold) and a fitted part (:attr:`Features.weighting`: TF-IDF, fitted on the training folds only). The
router stands behind the tokenizer, so every set starts from token ids; characters are those of the decoded ids.

Also here: a small transformer trained as a classifier, and the experts themselves as classifiers, where the
lowest loss wins (branch-train-merge, Li et al. 2022, arXiv 2208.03306, with a uniform prior over experts).

Shapes: ``n`` sequences of at most ``T`` ids, ``V`` ids, ``F`` columns, ``E`` experts, ``H`` features of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import cos, pi
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.naive_bayes import ComplementNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError, Shape
from mome_utils.models import build_gpt2
from mome_utils.router_fit import TokenTfidf, count_tokens

__all__ = [
    "CHARACTERS", "PAIRS", "PUBLISHED", "SEQUENCE", "TOKENS", "Features", "TransformerClassifier",
    "character_features", "cheap_classifiers", "costly_classifiers", "decode_sequences", "expert_losses",
    "feature_sets", "fitted_bytes", "pair_features", "reading_classifiers", "sequence_features",
    "settings_of", "token_features",
]

#: Names of the sets of features; PUBLISHED is the release's own, without ids 0 to 9.
TOKENS, PUBLISHED, PAIRS, CHARACTERS, SEQUENCE = (
    "tokens", "tokens_as_released", "token_pairs", "characters", "token_sequence"
)
#: Marks the places behind the end of a sequence in an array of ids.
PADDING = -1
#: Logits that one forward pass of an expert may hold (32 MB in float32).
MOST_LOGITS = 2**23


@dataclass(frozen=True)
class Features:
    """How sequences of ids become what a classifier sees.

    Attributes:
        name: one of the names above, or a new one.
        extract: sequences of ids -> rows that can be indexed (sparse counts [n, F], or an array [n, ...]).
            Nothing is fitted here, so it may run once for all folds.
        weighting: an unfitted transformer of these rows, fitted on training rows alone; ``None`` leaves them.
    """

    name: str
    extract: Callable[[Sequence[Any]], Any]
    weighting: Any = None


def token_features(vocab_size: int, *, published: bool = False) -> Features:
    """TF-IDF of single token ids, as published; ``published`` also loses the ids 0 to 9, as the release does."""
    return Features(
        PUBLISHED if published else TOKENS, partial(count_tokens, vocab_size=vocab_size),
        TokenTfidf(published_tokens=published),
    )


def pair_features(vocab_size: int, *, bits: int = 16) -> Features:
    """TF-IDF of single ids and of neighbouring pairs, the pairs hashed into ``2 ** bits`` columns."""
    return Features(PAIRS, partial(_count_pairs, vocab_size=vocab_size, bits=bits), TokenTfidf())


def _count_pairs(sequences: Sequence[Any], vocab_size: int, bits: int) -> sp.csr_matrix:
    """Counts [n, V + 2 ** bits]: ids in the first V columns, hashed pairs in the others.

    Multiplicative hashing (Knuth, TAOCP 3, 6.4): the upper bits of a product with 2 ** 64 / golden ratio.
    """
    rows = [np.asarray(sequence, dtype=np.uint64) for sequence in sequences]
    pairs = [row[:-1] * np.uint64(vocab_size) + row[1:] for row in rows]
    ids = np.concatenate([np.empty(0, np.uint64), *pairs])
    columns = (ids * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)
    starts = np.concatenate([[0], np.cumsum([pair.size for pair in pairs], dtype=np.int64)])
    hashed = sp.csr_matrix((np.ones(ids.size), columns.astype(np.int64), starts), shape=(len(rows), 2**bits))
    hashed.sum_duplicates()
    return sp.hstack([count_tokens(sequences, vocab_size), hashed], format="csr")


def decode_sequences(tokenizer: PreTrainedTokenizerFast, sequences: Sequence[Any]) -> list[str]:
    """The text of each sequence without special tokens; a character cut at an end becomes U+FFFD."""
    return tokenizer.batch_decode([np.asarray(s).tolist() for s in sequences], skip_special_tokens=True)


def character_features(tokenizer: PreTrainedTokenizerFast, *, longest: int = 3, bits: int = 16) -> Features:
    """TF-IDF of character n-grams (1 to ``longest``) of the decoded text, hashed into ``2 ** bits`` columns.

    Case is kept; runs of white space count as one space (scikit-learn's character analyzer).
    """
    hashing = HashingVectorizer(
        analyzer="char", ngram_range=(1, longest), n_features=2**bits, lowercase=False, norm=None,
        alternate_sign=False,
    )

    def extract(sequences: Sequence[Any]) -> sp.csr_matrix:
        return hashing.transform(decode_sequences(tokenizer, sequences))

    return Features(CHARACTERS, extract, TokenTfidf())


def sequence_features() -> Features:
    """The ids in their order, for models that read: int32 [n, T], PADDING behind the end."""
    return Features(SEQUENCE, _padded)


def _padded(sequences: Sequence[Any]) -> np.ndarray:
    table = np.full((len(sequences), max((len(s) for s in sequences), default=0)), PADDING, dtype=np.int32)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence)] = sequence
    return table


def feature_sets(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[Features, ...]:
    """All sets of the bake-off: tokens, tokens_as_released, token_pairs, characters, token_sequence."""
    return (
        token_features(vocab_size), token_features(vocab_size, published=True), pair_features(vocab_size),
        character_features(tokenizer), sequence_features(),
    )


def cheap_classifiers(seed: int) -> dict[str, Any]:
    """Linear classifiers and naive Bayes with scikit-learn's defaults, for any set of counted features."""
    return {
        "logistic_regression": LogisticRegression(max_iter=1000),
        "sgd": SGDClassifier(random_state=seed),
        "linear_svm": LinearSVC(random_state=seed),
        "naive_bayes": MultinomialNB(),
        "complement_naive_bayes": ComplementNB(),
    }


def costly_classifiers(seed: int) -> dict[str, Any]:
    """Classifiers that take a hundred times as long to fit or to ask, and are made smaller for that.

    30 trees instead of 100; boosting of 30 rounds on the 32 strongest singular directions, since it needs a
    dense table; one hidden layer of 32 that stops once two passes gain less than 0.001. Nearest neighbours
    compare with every training sequence (sparse rows allow no faster search).
    """
    boosting = HistGradientBoostingClassifier(
        max_iter=30, learning_rate=0.2, early_stopping=False, random_state=seed
    )
    return {
        "random_forest": RandomForestClassifier(30, random_state=seed),
        "gradient_boosting": make_pipeline(TruncatedSVD(32, random_state=seed), boosting),
        "knn": KNeighborsClassifier(),
        "mlp": MLPClassifier(
            (32,), learning_rate_init=3e-3, tol=1e-3, n_iter_no_change=2, random_state=seed
        ),
    }


def reading_classifiers(seed: int, vocab_size: int) -> dict[str, Any]:
    """Classifiers that read the ids in their order: a transformer of one layer and width 32, for 200 steps."""
    return {
        "transformer": TransformerClassifier(
            vocab_size=vocab_size, shape=Shape(1, 32, 2), steps=200, random_state=seed
        ),
    }


class TransformerClassifier(ClassifierMixin, BaseEstimator):
    """A GPT-2 decoder with a linear head, trained from scratch to tell classes apart.

    AdamW, 10 % linear warm-up, then cosine decay to zero. A sequence is summed up by the mean of its last
    hidden states (or the last one). Weights and order depend on ``random_state`` alone.

    Args:
        vocab_size: ``V``. shape: of the decoder. steps: optimizer steps of ``batch_size`` sequences each.
        pooling: "mean" or "last". learning_rate: its peak.

    Attributes:
        classes_: sorted labels. network_: the trained model.
    """

    def __init__(
        self, *, vocab_size: int, shape: Shape, steps: int, pooling: str = "mean", batch_size: int = 16,
        learning_rate: float = 3e-3, random_state: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.shape = shape
        self.steps = steps
        self.pooling = pooling
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        """Train on ids [n, T] (PADDING behind the end of a sequence) and labels [n]."""
        if self.pooling not in ("mean", "last"):
            raise MomeError(f"A sequence cannot be pooled by '{self.pooling}': choose mean or last.")
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.network_ = _Pooled(self, X.shape[1], len(self.classes_))
        generator = torch.Generator().manual_seed(self.random_state)
        rounds = -(-self.steps * self.batch_size // len(X))
        order = torch.cat([torch.randperm(len(X), generator=generator) for _ in range(rounds)])
        batches = order[: self.steps * self.batch_size].reshape(self.steps, -1)
        ids, target = torch.from_numpy(X.astype(np.int64)), torch.from_numpy(labels)
        optimizer = torch.optim.AdamW(self.network_.parameters(), lr=self.learning_rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warmup_cosine, steps=self.steps))
        for batch in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.network_(ids[batch]), target[batch]).backward()
            optimizer.step()
            rate.step()
        return self

    @torch.inference_mode()
    def predict(self, X: np.ndarray) -> np.ndarray:
        """Label of each row of ids [n, T]."""
        parts = torch.from_numpy(X.astype(np.int64)).split(64)
        return self.classes_[torch.cat([self.network_(ids).argmax(1) for ids in parts]).numpy()]


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + cos(pi * (step - warmup) / max(1, steps - warmup))) / 2


class _Pooled(nn.Module):
    """Ids [B, T] with PADDING -> logits [B, classes]. The head starts at zero, so no class is preferred."""

    def __init__(self, settings: TransformerClassifier, length: int, classes: int) -> None:
        super().__init__()
        model = build_gpt2(
            settings.shape, vocab_size=settings.vocab_size, block_size=length, seed=settings.random_state,
            bos=0, eos=0,
        )
        self.trunk = model.transformer
        self.head = nn.utils.skip_init(nn.Linear, settings.shape.width, classes)
        self.pooling = settings.pooling
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != PADDING
        states = self.trunk(input_ids=ids.clamp(min=0), attention_mask=mask.long(), use_cache=False)[0]
        length = mask.sum(1, keepdim=True).clamp(min=1)
        if self.pooling == "mean":
            return self.head((states * mask[:, :, None]).sum(1) / length)
        return self.head(states[torch.arange(len(ids)), length[:, 0] - 1])


@torch.inference_mode()
def expert_losses(experts: Mapping[str, Any], sequences: Sequence[Any]) -> np.ndarray:
    """Loss of each sequence under each expert, all ids but the first being targets.

    Args:
        experts: causal language models (ids [B, T] -> ``.logits`` [B, T, V]) by language.
        sequences: ids, two or more each, no longer than the models' context.

    Returns:
        Sums over targets in nats [n, E], float64. The experts' choice is ``argmin(1)``.

    Raises:
        MomeError: fewer than two experts, no sequence, or one of fewer than two ids, which has no target.
    """
    if len(experts) < 2:
        raise MomeError("Experts can only be compared where there are two or more: give one per language.")
    if min(map(len, sequences), default=0) < 2:
        raise MomeError("Experts need sequences of two ids or more, the first one as context: use longer ones.")
    losses = np.zeros((len(sequences), len(experts)))
    ids = torch.from_numpy(_padded(sequences).astype(np.int64))
    for column, model in enumerate(experts.values()):
        parameter = next(model.parameters())
        batch = max(1, MOST_LOGITS // (ids.shape[1] * model.config.vocab_size))
        parts = [_sequence_nats(model, part.to(parameter.device)) for part in ids.split(batch)]
        losses[:, column] = torch.cat(parts).numpy()
    return losses


def _sequence_nats(model: Any, ids: Tensor) -> Tensor:
    """Summed loss of each row of ids [B, T] with PADDING on the right, [B] float64 on the CPU."""
    logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids != PADDING).long(), use_cache=False).logits
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=PADDING)  # the last position has none
    nats = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none"
    )
    return nats.view_as(ids).double().sum(1).cpu()


#: Fitted attributes that hold what prediction reads, over all classifiers and weightings of the bake-off.
_READ = ("coef_", "intercept_", "feature_log_prob_", "class_log_prior_", "coefs_", "intercepts_", "components_",
         "tokens_", "idf_")


def fitted_bytes(model: Any) -> int:
    """Size of what prediction reads: coefficients, tree nodes, stored sequences, weights, as they lie in memory.

    scikit-learn's numbers are float64, so a file in float32 would be about half as large; no file is written.
    An unknown estimator counts with all its fitted arrays (public attributes that end in an underscore).
    ``None`` (no weighting) has no size.
    """
    return sum(array.nbytes for array in _arrays(model))


def _arrays(model: Any) -> Iterator[Any]:
    """The arrays (numpy or torch) that the fitted ``model`` needs to predict."""
    if model is None:
        return
    if isinstance(model, Pipeline):
        for _, step in model.steps:
            yield from _arrays(step)
    elif isinstance(model, TransformerClassifier):
        yield from {id(p): p for p in model.network_.parameters()}.values()
    elif isinstance(model, RandomForestClassifier):
        for tree in model.estimators_:
            state = tree.tree_.__getstate__()
            yield from (state["nodes"], state["values"])
    elif isinstance(model, HistGradientBoostingClassifier):
        yield from (predictor.nodes for round_ in model._predictors for predictor in round_)
    elif isinstance(model, KNeighborsClassifier):
        stored = model._fit_X
        yield from (stored.data, stored.indices, stored.indptr) if sp.issparse(stored) else (stored,)
        yield model._y
    else:
        held = vars(model)
        names = [name for name in _READ if name in held] or [name for name in held if name.endswith("_")]
        for name in names:
            values = held[name] if isinstance(held[name], list) else [held[name]]
            yield from (value for value in values if isinstance(value, np.ndarray))


def settings_of(estimator: Any) -> str:
    """An estimator's settings where they differ from its defaults, the seed left out.

    Example:
        >>> settings_of(costly_classifiers(3)["random_forest"])
        'RandomForestClassifier(n_estimators=30)'
    """
    if isinstance(estimator, Pipeline):
        return ", then ".join(settings_of(step) for _, step in estimator.steps)
    plain = clone(estimator)
    seed = signature(type(estimator)).parameters.get("random_state")
    if seed is not None:
        plain.set_params(random_state=seed.default)
    return " ".join(repr(plain).split())
