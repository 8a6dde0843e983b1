"""The router: exact against scikit-learn on every path, calibrated, able to abstain, safe to load."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

from mome_utils import routing
from mome_utils.artifacts import DamagedArtifact, file_digest
from mome_utils.bakeoff import document_blocks
from mome_utils.config import MomeError
from mome_utils.corpus import load_corpus
from mome_utils.router_fit import (
    AS_MEANT_PATTERN,
    PUBLISHED_PATTERN,
    fit_router,
    from_sklearn,
    labelled,
    words,
)
from mome_utils.routing import ABSTAIN, TokenRouter
from mome_utils.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60
LANGUAGES = ("en", "fr", "de", "py")


def synthetic(languages: int, number: int = 40, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences [number, length] of each language, from overlapping distributions; id 59 never occurs."""
    generator = np.random.default_rng(seed)
    blocks = {}
    for name in LANGUAGES[:languages]:
        chance = np.append(generator.gamma(0.4, size=VOCAB - 1), 0.0)
        blocks[name] = generator.choice(VOCAB, size=(number, length), p=chance / chance.sum())
    return blocks


def pipeline(languages: int, model: object, pattern: str = AS_MEANT_PATTERN) -> Pipeline:
    """The published pipeline, fitted on ids written as words."""
    blocks = synthetic(languages)
    labels = np.repeat(np.arange(languages), [len(b) for b in blocks.values()])
    texts = [text for block in blocks.values() for text in words(block)]
    return make_pipeline(TfidfVectorizer(token_pattern=pattern), model).fit(texts, labels)


def compiled(pipe: Pipeline, languages: int) -> TokenRouter:
    return from_sklearn(pipe[0], pipe[1], LANGUAGES[:languages], vocab_size=VOCAB)


def padded(sequences: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [B, T], padded on the right with a real id."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = 1
    return ids, mask


def assert_same(router: TokenRouter, pipe: Pipeline, sequences: list[list[int]], pad: int = 0) -> None:
    ids, mask = padded(sequences, pad)
    logits, texts = router(ids, mask), words(sequences)
    expected = pipe.decision_function(texts)
    if expected.ndim == 1:
        np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected, atol=1e-10, rtol=0)
    else:
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-10, rtol=0)
    assert router.route(ids, mask).tolist() == pipe.predict(texts).tolist()


#: Constants that make the router take one way of counting: all ids, pairs of positions, a table.
WAYS = {"dense": (10**9, 0), "pairs": (0, 0), "table": (0, 10**9)}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way of counting, with working memory for a few sequences at a time."""
    dense, pairs = WAYS[request.param]
    monkeypatch.setattr(routing, "_DENSE", dense)
    monkeypatch.setattr(routing, "_PAIRS", pairs)
    monkeypatch.setattr(routing, "_WORKSPACE", 3 * VOCAB)
    return request.param


MODELS = [LogisticRegression(max_iter=500), LinearSVC(random_state=0), SGDClassifier(random_state=0)]
SEQUENCES = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=24), min_size=1, max_size=6)


@pytest.mark.parametrize("languages", [2, 3, 4])
@pytest.mark.parametrize("pattern", [AS_MEANT_PATTERN, PUBLISHED_PATTERN])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_router_equals_the_published_pipeline_on_random_sequences(languages, pattern, model):
    pipe = pipeline(languages, model, pattern)
    router = compiled(pipe, languages)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(SEQUENCES, st.integers(0, VOCAB - 1))
    def check(sequences: list[list[int]], pad: int) -> None:
        assert_same(router, pipe, sequences, pad)

    check()


def test_every_way_of_counting_is_the_published_pipeline(way):
    pipe = pipeline(3, LogisticRegression())
    router = compiled(pipe, 3)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(SEQUENCES, st.integers(0, VOCAB - 1))
    def check(sequences: list[list[int]], pad: int) -> None:
        assert_same(router, pipe, sequences, pad)

    check()
    empty = router(torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(empty, router.bias.expand(2, -1))
    assert router(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 3)


def test_the_ways_of_counting_agree_on_long_sequences_of_a_large_vocabulary(monkeypatch):
    router, generator = TokenRouter(5000, ("a", "b")), torch.Generator().manual_seed(0)
    router.idf.copy_(torch.rand(5000, generator=generator).round(decimals=1))
    router.weight.copy_(torch.randn(2, 5000, generator=generator))
    ids = torch.randint(0, 5000, (7, 90), generator=generator) ** 2 // 5000
    mask = torch.rand(7, 90, generator=generator) < 0.8
    answers = []
    for dense, pairs in WAYS.values():
        monkeypatch.setattr(routing, "_DENSE", dense)
        monkeypatch.setattr(routing, "_PAIRS", pairs)
        answers.append(router(ids, mask))
    features = torch.stack([torch.bincount(i[m], minlength=5000) for i, m in zip(ids, mask, strict=True)]) * router.idf
    expected = features @ router.weight.T / features.norm(dim=1, keepdim=True)
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def real():
    """The block sequences of a slice of the embedded corpus, by language, with 700 ids."""
    corpus = load_corpus("embedded", topics=24, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 700)
    return {name: document_blocks(tokenizer, corpus.of_language(name), 64)[0] for name in corpus.languages}


def test_router_equals_the_published_pipeline_on_ten_thousand_real_and_random_sequences(real):
    blocks = real
    counts, labels = labelled(blocks, 700)
    everything = [block.tolist() for sequences in blocks.values() for block in sequences]
    pipe = make_pipeline(TfidfVectorizer(token_pattern=AS_MEANT_PATTERN), LogisticRegression(max_iter=1000))
    pipe.fit(words(everything), labels)
    router = from_sklearn(pipe[0], pipe[1], tuple(blocks), vocab_size=700)
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 700, size=generator.integers(0, 65)).tolist() for _ in range(5000)]
    pieces = []
    for _ in range(5000):
        block = everything[generator.integers(len(everything))]
        start = generator.integers(len(block))
        pieces.append(block[start : start + generator.integers(1, 65)])
    assert_same(router, pipe, noise + pieces)


@pytest.mark.parametrize("languages", [2, 4])
def test_empty_and_all_padding_sequences_give_the_intercept(languages):
    pipe = pipeline(languages, LogisticRegression())
    router = compiled(pipe, languages)
    expected = pipe.decision_function([""])[0]
    for logits in (
        router(torch.zeros(1, 0, dtype=torch.int64))[0],
        router(torch.full((1, 5), 7), torch.zeros(1, 5, dtype=torch.int64))[0],
        router(torch.full((1, 5), 59))[0],  # an id that training never saw
    ):
        torch.testing.assert_close(logits, router.bias)
        value = logits.numpy() if languages > 2 else (logits[1] - logits[0]).item()
        np.testing.assert_allclose(value, expected, atol=1e-12)


def test_the_mask_hides_padding_on_either_side_and_of_any_type():
    router = fit_router(synthetic(3), VOCAB)
    ids = torch.tensor([[3, 4, 20, 20, 41]])
    right, left = torch.cat([ids, ids], dim=1), torch.cat([ids.flip(1), ids], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 5])
    for kind in (torch.int64, torch.bool, torch.float32):
        torch.testing.assert_close(router(right, mask.to(kind)), router(ids))
        torch.testing.assert_close(router(left, mask.flip(1).to(kind)), router(ids))
    assert not torch.allclose(router(torch.cat([ids, torch.full_like(ids, 5)], dim=1)), router(ids))
    foreign = torch.cat([ids, torch.full_like(ids, -100)], dim=1)  # what is masked may be no id at all
    torch.testing.assert_close(router(foreign, mask), router(ids))
    assert torch.equal(router(ids.int()), router(ids)) and torch.equal(router(ids, mask[:, :5]), router(ids))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary", [90, 1500])
def test_routes_are_the_largest_logits_even_where_float32_cannot_tell(vocabulary, masked):
    """The rows of each pair of languages differ by 1e-9 to 1e-3 of their size; every other sequence is easy."""
    generator = torch.Generator().manual_seed(0)
    router = TokenRouter(vocabulary, LANGUAGES)
    router.idf.copy_(1 + 5 * torch.rand(vocabulary, generator=generator, dtype=torch.float64))
    router.weight.copy_(torch.randn(2, vocabulary, generator=generator, dtype=torch.float64).repeat_interleave(2, 0))
    apart = torch.tensor([[1e-9], [1e-3]], dtype=torch.float64)
    router.weight[1::2] += apart * torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.05, 0.05]))
    ids = torch.randint(0, vocabulary, (300, 64), generator=generator)
    mask = torch.rand(300, 64, generator=generator) < 0.7 if masked else None
    routes, logits = router.route(ids, mask), router(ids, mask)
    assert torch.equal(routes, logits.argmax(1)) and len(set(routes.tolist())) == 4
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).median() < 1e-3  # most of them are close
    _, left = router._decide(*router._checked(ids, mask))
    assert 0 < len(left) < len(ids)  # the sums decide some, and know that they cannot decide the others
    router.weight[1::2] = -router.weight[::2]
    _, left = router._decide(*router._checked(ids, mask))
    assert torch.equal(router.route(ids, mask), router(ids, mask).argmax(1)) and len(left) < 0.4 * len(ids)


def test_sums_that_float32_cannot_hold_decide_nothing():
    router = TokenRouter(50, LANGUAGES[:3])
    generator = torch.Generator().manual_seed(0)
    router.idf.fill_(1e22)
    router.weight.copy_(torch.randn(3, 50, generator=generator, dtype=torch.float64))
    router.bias.copy_(torch.tensor([0.5, -0.2, -0.1]))
    ids = torch.randint(0, 50, (2000, 6), generator=generator)
    assert torch.equal(router.route(ids), router(ids).argmax(1))


def test_ids_and_masks_that_do_not_fit_are_refused_with_a_sentence(way):
    router = fit_router(synthetic(3), VOCAB)
    for ids in ([[3, VOCAB]], [[-1, 3]]):
        for call in (router, router.route, router.probabilities):
            with pytest.raises(MomeError, match="outside the router's vocabulary of 60 ids"):
                call(torch.tensor(ids))
    with pytest.raises(MomeError, match=r"reads whole numbers \[sequences, positions\], not torch.float32"):
        router(torch.ones(1, 3))
    with pytest.raises(MomeError, match=r"of shape \(3,\)"):
        router(torch.tensor([1, 2, 3]))
    with pytest.raises(MomeError, match=r"mask has the shape \(1, 2\), but the ids have \(1, 3\)"):
        router(torch.tensor([[1, 2, 3]]), torch.ones(1, 2))
    with pytest.raises(MomeError, match="one sequence"):
        router.contributions(torch.tensor([[1, 2, 3]]))
    with pytest.raises(MomeError, match="outside"):
        router.contributions(torch.tensor([VOCAB]))


def test_two_language_router_gives_the_probabilities_of_logistic_regression():
    pipe = pipeline(2, LogisticRegression())
    sequences = [[1, 2, 3], [30, 40], []]
    logits = compiled(pipe, 2)(*padded(sequences, 0))
    np.testing.assert_allclose(logits.softmax(1).numpy(), pipe.predict_proba(words(sequences)), atol=1e-9)


def test_loaded_numbers_count_at_once():
    """Nothing that the router computes from its buffers outlives a change of them."""
    first, second = (fit_router(synthetic(3, seed=seed), VOCAB) for seed in (0, 1))
    ids = torch.randint(0, VOCAB - 1, (9, 12), generator=torch.Generator().manual_seed(0))
    before = first(ids)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(ids), second(ids)) and not torch.equal(first(ids), before)
    first.idf.zero_()
    assert torch.equal(first(ids), first.bias.expand(9, -1))


def test_contributions_add_up_to_the_logits_and_are_equal_for_equal_tokens():
    router = fit_router(synthetic(3), VOCAB)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
    def check(sequence: list[int]) -> None:
        ids = torch.tensor(sequence, dtype=torch.int64)
        parts = router.contributions(ids)
        assert parts.shape == (len(sequence), 3)
        torch.testing.assert_close(parts.sum(0) + router.bias, router(ids[None])[0], atol=1e-12, rtol=0)
        for token in set(sequence):
            assert (parts[ids == token] == parts[ids == token][0]).all()
            assert (parts[ids == token] != 0).any() == (router.idf[token] > 0)

    check()


def test_probabilities_are_the_softmax_at_the_temperature_of_the_length():
    router = fit_router(synthetic(3), VOCAB)
    seen = router.idf.nonzero().ravel()
    ids = seen[torch.randint(len(seen), (1, 6000), generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(router.probabilities(ids), router(ids).softmax(1))  # not calibrated: 1 everywhere
    router.temperature.copy_(torch.linspace(0.5, 3.5, 13))  # rises by 1/4 with each doubling
    logits = router(ids)
    known = {1: 0.5, 2: 0.75, 3: 0.5 + np.log2(3) / 4, 4: 1.0, 100: 0.5 + np.log2(100) / 4, 4096: 3.5, 6000: 3.5}
    for number, temperature in known.items():
        scores = router(ids[:, :number]) / temperature
        torch.testing.assert_close(router.probabilities(ids[:, :number]), scores.softmax(1))
        mask = torch.arange(6000)[None] < number
        torch.testing.assert_close(router.probabilities(ids, mask), scores.softmax(1))
        padded_with_unknown = torch.cat([ids[:, :number], torch.full((1, 50), 59)], dim=1)
        torch.testing.assert_close(router.probabilities(padded_with_unknown), scores.softmax(1))
    nothing = router.probabilities(torch.zeros(1, 0, dtype=torch.int64))
    torch.testing.assert_close(nothing[0], (router.bias / 0.5).softmax(0))
    assert torch.equal(router(ids), logits)


def test_a_router_abstains_where_it_is_not_sure_and_nowhere_else(tmp_path):
    router = fit_router(synthetic(4), VOCAB)
    ids = torch.randint(0, VOCAB, (200, 5), generator=torch.Generator().manual_seed(0))
    chosen, sure = router.route(ids), router.probabilities(ids).amax(1)
    assert router.abstain_below is None and torch.equal(chosen, router(ids).argmax(1))
    level = float(sure.quantile(0.3))
    router.abstain_below = level
    routes = router.route(ids)
    assert torch.equal(routes, torch.where(sure < level, ABSTAIN, chosen)) and (routes == ABSTAIN).sum() == 60
    router.save(tmp_path)
    assert TokenRouter.load(tmp_path).abstain_below == level
    other = TokenRouter(VOCAB, router.languages)
    other.load_state_dict(router.state_dict())  # a model that owns a router keeps it in this way
    assert torch.equal(other.route(ids), routes)
    router.temperature.fill_(1e-6)  # certain of everything
    assert torch.equal(router.route(ids), chosen)
    router.abstain_below = None
    assert router.abstain_below is None
    for wrong in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(MomeError, match="more than 0 and at most 1"):
            router.abstain_below = wrong


def test_casting_or_moving_the_owner_does_not_change_the_router():
    router = fit_router(synthetic(4), VOCAB)
    owner = torch.nn.Module()
    owner.router, owner.head = router, torch.nn.Linear(2, 2)
    before = {name: buffer.clone() for name, buffer in router.state_dict().items()}
    owner.to(torch.bfloat16).half().float()
    for name, buffer in router.state_dict().items():
        assert buffer.dtype == torch.float64 and torch.equal(buffer, before[name])
    assert not list(router.parameters())
    assert owner.to("meta").router.idf.is_meta


def test_save_and_load_round_trip(tmp_path):
    router = fit_router(synthetic(3), VOCAB)
    router.save(tmp_path / "router")
    again = TokenRouter.load(tmp_path / "router")
    assert again.languages == ("en", "fr", "de") and again.vocab_size == VOCAB
    ids = torch.randint(0, VOCAB, (20, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(router(ids), again(ids))
    assert sorted(p.name for p in (tmp_path / "router").iterdir()) == ["router.json", "router.safetensors"]
    empty = TokenRouter(VOCAB, router.languages)
    empty.load_state_dict(router.state_dict())
    assert torch.equal(empty(ids), router(ids))


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def rewrite(folder: Path, **changes: object) -> None:
    """Change facts in router.json; the hash is made to fit the weights, as someone with intent would."""
    facts = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    facts |= {"sha256": file_digest(folder / "router.safetensors")} | changes
    (folder / "router.json").write_text(json.dumps(facts), encoding="utf-8")


def _truncate(folder: Path, bomb: Path) -> None:
    data = (folder / "router.safetensors").read_bytes()
    (folder / "router.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(folder: Path, bomb: Path) -> None:
    (folder / "router.safetensors").write_bytes(pickle.dumps(Bomb(bomb)))


def _torch_pickle(folder: Path, bomb: Path) -> None:
    torch.save({"idf": Bomb(bomb)}, folder / "router.safetensors")


def _flip_a_bit(folder: Path, bomb: Path) -> None:
    data = bytearray((folder / "router.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "router.safetensors").write_bytes(bytes(data))


def _other_shape(folder: Path, bomb: Path) -> None:
    TokenRouter(VOCAB + 1, ("en", "fr", "de")).save(folder.parent / "other")
    (folder / "router.safetensors").write_bytes((folder.parent / "other/router.safetensors").read_bytes())


def _other_tensors(folder: Path, bomb: Path) -> None:
    safetensors.torch.save_file({"idf": torch.ones(VOCAB)}, folder / "router.safetensors")


def _with(name: str, value: object, folder: Path) -> None:
    tensors = dict(TokenRouter(VOCAB, ("en", "fr", "de")).state_dict())
    tensors[name] = value(tensors[name]) if callable(value) else torch.full_like(tensors[name], value)
    safetensors.torch.save_file(tensors, folder / "router.safetensors")


def _not_finite(folder: Path, bomb: Path) -> None:
    _with("bias", torch.nan, folder)


def _negative_statistics(folder: Path, bomb: Path) -> None:
    _with("statistics", -1.0, folder)


def _no_temperature(folder: Path, bomb: Path) -> None:
    _with("temperature", 0.0, folder)


def _impossible_threshold(folder: Path, bomb: Path) -> None:
    _with("threshold", 1.5, folder)


def _other_numbers(folder: Path, bomb: Path) -> None:
    _with("idf", torch.Tensor.half, folder)


def _unknown_numbers(folder: Path, bomb: Path) -> None:
    header = json.dumps({"idf": {"dtype": "F4", "shape": [VOCAB], "data_offsets": [0, VOCAB // 2]}}).encode()
    (folder / "router.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(VOCAB // 2))


def _enormous_header(folder: Path, bomb: Path) -> None:
    (folder / "router.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _nothing(folder: Path, bomb: Path) -> None:
    (folder / "router.safetensors").write_bytes(b"")


DAMAGE = [
    _truncate, _pickle, _torch_pickle, _other_shape, _other_tensors, _not_finite, _negative_statistics, _no_temperature,
    _impossible_threshold, _other_numbers, _unknown_numbers, _enormous_header, _nothing,
]


@pytest.mark.parametrize(
    ("damage", "hash_fits"), [(d, fits) for d in DAMAGE for fits in (False, True)] + [(_flip_a_bit, False)]
)
def test_foreign_and_damaged_weights_give_one_clear_error_and_run_nothing(tmp_path, damage, hash_fits):
    folder, bomb = tmp_path / "router", tmp_path / "exploded"
    fit_router(synthetic(3), VOCAB).save(folder)
    damage(folder, bomb)
    if hash_fits:
        rewrite(folder)
    with pytest.raises(DamagedArtifact) as caught:
        TokenRouter.load(folder)
    message = str(caught.value)
    assert "router/router.safetensors" in message and "notebook 04" in message and "\n" not in message
    assert str(tmp_path) not in message
    assert not bomb.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"languages": ["en", "fr"]}, {"languages": ["en", "fr", "de", "py"]}, {"languages": "enf"},
        {"languages": [1, 2, 3]}, {"languages": ["en", "en", "fr"]}, {"languages": ["en"]},
        {"vocab_size": VOCAB - 1}, {"vocab_size": 0},
        {"vocab_size": "60"}, {"vocab_size": True}, {"format": "another"}, {"version": 1}, {"sha256": None},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_gives_one_clear_error(tmp_path, changes):
    fit_router(synthetic(3), VOCAB).save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(DamagedArtifact, match="fit the router again with notebook 04") as caught:
        TokenRouter.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path.parent) not in str(caught.value)


def test_a_missing_or_unreadable_description_gives_one_clear_error(tmp_path):
    fit_router(synthetic(3), VOCAB).save(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[]", b"[" * 100_000, pickle.dumps(Bomb(tmp_path / "exploded"))):
        (tmp_path / "router.json").write_bytes(content)
        with pytest.raises(MomeError, match="router.json cannot be used"):
            TokenRouter.load(tmp_path)
    (tmp_path / "router.json").unlink()
    with pytest.raises(MomeError, match="it is missing"):
        TokenRouter.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_router_needs_languages_and_ids():
    with pytest.raises(MomeError, match="two or more different languages"):
        TokenRouter(10, ("en",))
    with pytest.raises(MomeError, match="two or more different languages"):
        TokenRouter(10, ("en", "en"))
    with pytest.raises(MomeError, match="one id or more"):
        TokenRouter(0, ("en", "fr"))
