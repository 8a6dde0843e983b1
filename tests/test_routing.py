"""The router and its bake-off: exact against scikit-learn, safe to load, honest folds and intervals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import precision_recall_fscore_support
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

from mome_utils.artifacts import file_digest
from mome_utils.bakeoff import (
    NAMES,
    PUBLISHED,
    assign_folds,
    bake_off,
    classifiers,
    confusion_counts,
    cross_validate,
    document_blocks,
    f1_interval,
    lead_interval,
    relative_cost,
    score_table,
    weighted_scores,
)
from mome_utils.config import MomeError
from mome_utils.corpus import Document, load_corpus
from mome_utils.routing import (
    AS_MEANT_PATTERN,
    PUBLISHED_PATTERN,
    TokenRouter,
    TokenTfidf,
    count_tokens,
    fit_router,
    labelled,
    top_features,
    words,
)
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
    return TokenRouter.from_sklearn(pipe[0], pipe[1], LANGUAGES[:languages], vocab_size=VOCAB)


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
        np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected, atol=1e-5)
    else:
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
    assert router.route(ids, mask).tolist() == pipe.predict(texts).tolist()


MODELS = [LogisticRegression(max_iter=500), LinearSVC(random_state=0), SGDClassifier(random_state=0)]
SEQUENCES = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=24), min_size=1, max_size=6)


@pytest.mark.parametrize("languages", [2, 3, 4])
@pytest.mark.parametrize("pattern", [AS_MEANT_PATTERN, PUBLISHED_PATTERN])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_router_equals_the_published_pipeline_on_random_sequences(languages, pattern, model):
    pipe = pipeline(languages, model, pattern)
    router = compiled(pipe, languages)

    @settings(max_examples=25, deadline=None)
    @given(SEQUENCES, st.integers(0, VOCAB - 1))
    def check(sequences: list[list[int]], pad: int) -> None:
        assert_same(router, pipe, sequences, pad)

    check()


@pytest.fixture(scope="module")
def real():
    """A tokenizer, and the block sequences and topics of a slice of the embedded corpus."""
    corpus = load_corpus("embedded", topics=24, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 700)
    cut = {name: document_blocks(tokenizer, corpus.of_language(name), 64) for name in corpus.languages}
    return tokenizer, {k: v[0] for k, v in cut.items()}, {k: v[1] for k, v in cut.items()}


def test_router_equals_the_published_pipeline_on_ten_thousand_real_and_random_sequences(real):
    _, blocks, _ = real
    counts, labels = labelled(blocks, 700)
    everything = [block.tolist() for sequences in blocks.values() for block in sequences]
    pipe = make_pipeline(TfidfVectorizer(token_pattern=AS_MEANT_PATTERN), LogisticRegression(max_iter=1000))
    pipe.fit(words(everything), labels)
    router = TokenRouter.from_sklearn(pipe[0], pipe[1], tuple(blocks), vocab_size=700)
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 700, size=generator.integers(0, 65)).tolist() for _ in range(5000)]
    pieces = []
    for _ in range(5000):
        block = everything[generator.integers(len(everything))]
        start = generator.integers(len(block))
        pieces.append(block[start : start + generator.integers(1, 65)])
    assert_same(router, pipe, noise + pieces)


def test_features_equal_the_vectorizer_on_ids_written_as_words():
    blocks = [row.tolist() for block in synthetic(3).values() for row in block]
    unseen = [[59, 59], [], [0, 1, 2], [59, 30, 30, 4]]
    for pattern, published in ((AS_MEANT_PATTERN, False), (PUBLISHED_PATTERN, True)):
        vectorizer = TfidfVectorizer(token_pattern=pattern).fit(words(blocks))
        ours = TokenTfidf(published_tokens=published).fit(count_tokens(blocks, VOCAB))
        order = [vectorizer.vocabulary_[str(token)] for token in ours.tokens_]
        assert len(order) == len(vectorizer.vocabulary_)
        for sequences in (blocks, unseen):
            expected = vectorizer.transform(words(sequences))[:, order].toarray()
            np.testing.assert_allclose(
                ours.transform(count_tokens(sequences, VOCAB)).toarray(), expected, atol=1e-12
            )


def test_the_published_token_pattern_drops_the_ids_0_to_9():
    sequences = [list(range(VOCAB))]
    published = TfidfVectorizer(token_pattern=PUBLISHED_PATTERN).fit(words(sequences))
    assert TfidfVectorizer().token_pattern == PUBLISHED_PATTERN
    assert {int(word) for word in published.get_feature_names_out()} == set(range(10, VOCAB))
    assert TokenTfidf(published_tokens=True).fit(count_tokens(sequences, VOCAB)).tokens_.min() == 10
    router = fit_router(synthetic(2), VOCAB, published_tokens=True)
    ids = torch.tensor([[30, 31, 40]])
    noisy = torch.cat([ids, torch.arange(10)[None]], dim=1)
    torch.testing.assert_close(router(ids), router(noisy))


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


def test_two_language_router_gives_the_probabilities_of_logistic_regression():
    pipe = pipeline(2, LogisticRegression())
    sequences = [[1, 2, 3], [30, 40], []]
    logits = compiled(pipe, 2)(*padded(sequences, 0))
    np.testing.assert_allclose(logits.softmax(1).numpy(), pipe.predict_proba(words(sequences)), atol=1e-9)


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


def _not_finite(folder: Path, bomb: Path) -> None:
    router = TokenRouter(VOCAB, ("en", "fr", "de"))
    router.bias[0] = torch.nan
    safetensors.torch.save_file(dict(router.state_dict()), folder / "router.safetensors")


DAMAGE = [_truncate, _pickle, _torch_pickle, _other_shape, _other_tensors, _not_finite]


@pytest.mark.parametrize(
    ("damage", "hash_fits"), [(d, fits) for d in DAMAGE for fits in (False, True)] + [(_flip_a_bit, False)]
)
def test_foreign_and_damaged_weights_give_one_clear_error_and_run_nothing(tmp_path, damage, hash_fits):
    folder, bomb = tmp_path / "router", tmp_path / "exploded"
    fit_router(synthetic(3), VOCAB).save(folder)
    damage(folder, bomb)
    if hash_fits:
        rewrite(folder)
    with pytest.raises(MomeError) as caught:
        TokenRouter.load(folder)
    message = str(caught.value)
    assert "router/router.safetensors" in message and "notebook 04" in message and "\n" not in message
    assert str(tmp_path) not in message
    assert not bomb.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"languages": ["en", "fr"]}, {"languages": ["en", "fr", "de", "py"]}, {"languages": "enf"},
        {"languages": [1, 2, 3]}, {"languages": ["en", "en", "fr"]}, {"vocab_size": VOCAB - 1},
        {"vocab_size": "60"}, {"vocab_size": True}, {"format": "another"}, {"version": 2}, {"sha256": None},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_gives_one_clear_error(tmp_path, changes):
    fit_router(synthetic(3), VOCAB).save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(MomeError):
        TokenRouter.load(tmp_path)


def test_a_missing_or_unreadable_description_gives_one_clear_error(tmp_path):
    fit_router(synthetic(3), VOCAB).save(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[]", pickle.dumps(Bomb(tmp_path / "exploded"))):
        (tmp_path / "router.json").write_bytes(content)
        with pytest.raises(MomeError, match="router.json cannot be used"):
            TokenRouter.load(tmp_path)
    (tmp_path / "router.json").unlink()
    with pytest.raises(MomeError, match="it is missing"):
        TokenRouter.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(MomeError, match="two or more different languages"):
        TokenRouter(10, ("en",))
    with pytest.raises(MomeError, match="two or more different languages"):
        TokenRouter(10, ("en", "en"))
    with pytest.raises(MomeError, match="one id or more"):
        TokenRouter(0, ("en", "fr"))
    with pytest.raises(MomeError, match="outside the router's vocabulary of 60"):
        count_tokens([[60]], VOCAB)
    with pytest.raises(MomeError, match="outside"):
        count_tokens([[-1]], VOCAB)
    with pytest.raises(MomeError, match="without text for fr"):
        fit_router({"en": [[1, 2]], "fr": []}, VOCAB)
    with pytest.raises(MomeError, match="two or more languages"):
        fit_router({"en": [[1, 2]]}, VOCAB)
    counts, labels = labelled(synthetic(3), VOCAB)
    vectorizer = TokenTfidf().fit(counts)
    forest = RandomForestClassifier(3).fit(vectorizer.transform(counts), labels)
    with pytest.raises(MomeError, match="RandomForestClassifier is not"):
        TokenRouter.from_sklearn(vectorizer, forest, LANGUAGES[:3])
    linear = LogisticRegression().fit(vectorizer.transform(counts), labels)
    with pytest.raises(MomeError, match="knows 3 classes, but 2 names"):
        TokenRouter.from_sklearn(vectorizer, linear, ("en", "fr"))
    bigrams = TfidfVectorizer(token_pattern=AS_MEANT_PATTERN, ngram_range=(1, 2)).fit(["1 2"])
    with pytest.raises(MomeError, match="plain TF-IDF"):
        TokenRouter.from_sklearn(bigrams, linear, LANGUAGES[:3], vocab_size=VOCAB)


def test_top_features_are_decoded_and_belong_to_their_language(real):
    tokenizer, blocks, _ = real
    table = top_features(fit_router(blocks, 700), tokenizer, n=12)
    assert list(table.groupby("language", sort=False).size()) == [12] * len(blocks)
    texts = {name: set(part["text"].str.strip()) for name, part in table.groupby("language")}
    assert "the" in texts["en"] and "der" in texts["de"] and "=" in texts["py"]
    assert table.groupby("language")["weight"].apply(lambda w: w.is_monotonic_decreasing).all()


# --- bake-off -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=6), min_size=2, max_size=40), st.integers(0, 5), st.data())
def test_every_topic_has_one_fold_and_folds_have_like_sizes(topics, seed, data):
    folds = data.draw(st.integers(2, len(topics)))
    chosen = assign_folds([*topics, *topics], folds, seed)
    sizes = pd.Series(chosen).value_counts()
    assert set(chosen) == topics and len(sizes) == folds and sizes.max() - sizes.min() <= 1


def test_folds_never_share_a_topic_not_even_between_languages(real):
    _, blocks, topics = real
    rows = cross_validate(
        blocks, topics, 700, estimators={"svm": LinearSVC(random_state=0)}, folds=4, seed=1
    )
    assert (rows.groupby("topic")["fold"].nunique() == 1).all()
    assert len(rows) == sum(map(len, blocks.values()))
    assert rows["language"].value_counts().to_dict() == {k: len(v) for k, v in blocks.items()}
    assert weighted_scores(confusion_counts(rows, list(blocks)))["f1"] > 97


def test_a_classifier_is_never_fitted_on_a_topic_it_is_tested_on():
    """One id per topic: were a topic on both sides, nearest neighbours would know every answer."""
    topics = {name: [f"t{i // 4}" for i in range(80)] for name in ("a", "b")}
    blocks = {name: [[side + 2 * (i // 4)] * 3 for i in range(80)] for side, name in enumerate(topics)}
    rows = cross_validate(blocks, topics, VOCAB, estimators={"knn": classifiers(0)["knn"]}, folds=5)
    assert rows["predicted"].nunique() == 1  # nothing known: every sequence gets the same answer
    leaky = TokenTfidf().fit(labelled(blocks, VOCAB)[0])
    assert len(leaky.tokens_) == 40


def test_document_blocks_are_full_and_keep_only_whole_short_documents(real):
    tokenizer = real[0]
    texts = {"long": "word " * 300, "short": "one two", "exact": ""}
    documents = [Document(name, "en", "", "", text) for name, text in texts.items()]
    blocks, topics = document_blocks(tokenizer, documents, 32)
    sizes = {name: [len(b) for b, t in zip(blocks, topics, strict=True) if t == name] for name in texts}
    assert set(sizes["long"]) == {32} and len(sizes["long"]) > 5
    assert len(sizes["short"]) == 1 and sizes["short"][0] < 32 and sizes["exact"] == [2]
    joined = np.concatenate([b for b, t in zip(blocks, topics, strict=True) if t == "long"])
    assert joined[0] == tokenizer.bos_token_id
    assert texts["long"].startswith(tokenizer.decode(joined[1:].tolist()))
    assert document_blocks(tokenizer, [], 32) == ([], [])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=60))
def test_scores_equal_scikit_learn(pairs):
    truth, guess = zip(*pairs, strict=True)
    counts = confusion_counts(pd.DataFrame({"language": truth, "predicted": guess}), list("abc"))
    expected = precision_recall_fscore_support(
        truth, guess, labels=list("abc"), average="weighted", zero_division=0
    )
    ours = weighted_scores(counts)
    for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
        assert ours[name] == pytest.approx(100 * value)


def outcome(errors: dict[str, set[str]], topics: int = 50, per_topic: int = 4) -> pd.DataFrame:
    """Rows of a made-up bake-off: each classifier takes one 'fr' block of some topics for 'en'."""
    rows = [
        {
            "seed": 0, "fold": 0, "classifier": name, "topic": f"t{topic}", "language": language,
            "predicted": "en" if i == 0 and f"t{topic}" in wrong else language,
            "fit_seconds": 2.0 if name == "logistic_regression" else 6.0, "predict_seconds": 0.5,
        }
        for name, wrong in errors.items()
        for topic in range(topics) for language in ("en", "fr") for i in range(per_topic)
    ]
    return pd.DataFrame(rows)


def test_f1_interval_on_a_hand_case():
    """10 of 50 topics hold one wrong block of 8: recall of fr is 190/200, precision of en 200/210."""
    rows = outcome({"sgd": {f"t{i}" for i in range(10)}})
    limits = f1_interval(rows, "sgd")
    expected = 100 * (2 * 200 / (200 + 210) + 2 * 190 / (190 + 200)) / 2
    assert limits.estimate == pytest.approx(expected)
    # An independent bootstrap over topics, with scikit-learn's F1.
    generator, parts = np.random.default_rng(1), [part for _, part in rows.groupby("topic")]
    draws = []
    for _ in range(150):
        sample = pd.concat([parts[i] for i in generator.integers(len(parts), size=len(parts))])
        counts = confusion_counts(sample, ["en", "fr"])
        draws.append(float(weighted_scores(counts)["f1"]))
    assert (limits.high - limits.low) / 2 == pytest.approx(2.01 * np.std(draws), rel=0.2)
    assert (limits.seeds, limits.documents) == (1, 50)


def test_intervals_of_faultless_classifiers_still_have_a_width():
    rows = outcome({"logistic_regression": set(), "sgd": set()})
    limits, lead = f1_interval(rows, "sgd"), lead_interval(rows, "logistic_regression")
    assert (limits.estimate, limits.high) == (100, 100) and limits.low == pytest.approx(100 - 300 / 400)
    assert lead.estimate == 0 and lead.low == -lead.high == pytest.approx(-300 / 400)


def test_lead_is_to_the_best_of_the_others():
    few, many = {f"t{i}" for i in range(5)}, {f"t{i}" for i in range(25)}
    rows = outcome({"logistic_regression": few, "sgd": many, "knn": set()})
    lead = lead_interval(rows, "logistic_regression")
    table = score_table(rows)
    assert list(table["classifier"]) == ["knn", "logistic_regression", "sgd"]
    assert lead.estimate == pytest.approx(table["f1"][1] - 100) and lead.high < 0
    assert lead_interval(rows, "knn").low > 0
    cost = relative_cost(rows).set_index("classifier")
    assert cost.loc["sgd", "fit_ratio"] == 3 and cost.loc["logistic_regression", "fit_ratio"] == 1
    with pytest.raises(MomeError, match="no classifier 'mlp'"):
        f1_interval(rows, "mlp")
    with pytest.raises(MomeError, match="two classifiers"):
        lead_interval(rows[rows["classifier"] == "knn"], "knn")


def test_cross_validation_repeats_exactly_and_by_seed(real):
    _, blocks, topics = real
    chosen = {name: classifiers(3)[name] for name in ("sgd", "naive_bayes")}
    runs = [cross_validate(blocks, topics, 700, estimators=chosen, folds=3, seed=s) for s in (3, 3, 4)]
    first, second, other = (run.drop(columns=["fit_seconds", "predict_seconds"]) for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert not first["fold"].equals(other["fold"])
    both = pd.concat(runs[1:], ignore_index=True)
    assert f1_interval(both, "sgd").seeds == 2 and set(classifiers(0)) >= {"logistic_regression", "knn"}


def test_the_bake_off_holds_all_classifiers_and_the_features_as_released(real):
    _, blocks, topics = real
    few = {name: sequences[:60] for name, sequences in blocks.items()}
    rows = bake_off(few, {name: topics[name][:60] for name in few}, 700, seeds=(0, 1), folds=2)
    assert set(rows["classifier"]) == {*classifiers(0), PUBLISHED} == set(NAMES)
    per_run = rows.groupby(["seed", "classifier"])[["language", "sequence"]].apply(lambda r: r.duplicated().any())
    assert len(per_run) == 14 and not per_run.any()
    first = rows.iloc[0]
    assert topics[first["language"]][first["sequence"]] == first["topic"]


def test_cross_validation_refuses_what_it_cannot_do():
    blocks, topics = {"a": [[1], [2]], "b": [[3], [4]]}, {"a": ["x", "y"], "b": ["x", "y"]}
    chosen = {"nb": classifiers(0)["naive_bayes"]}
    with pytest.raises(MomeError, match="2 topics cannot be dealt into 3 folds"):
        cross_validate(blocks, topics, VOCAB, estimators=chosen, folds=3)
    with pytest.raises(MomeError, match="two or more languages"):
        cross_validate({"a": blocks["a"]}, topics, VOCAB, estimators=chosen)
    with pytest.raises(MomeError, match="'b' has not one topic per sequence"):
        cross_validate(blocks, topics | {"b": ["x"]}, VOCAB, estimators=chosen)
    with pytest.raises(MomeError, match="all its topics in one fold"):
        cross_validate(blocks, topics | {"a": ["x", "x"]}, VOCAB, estimators=chosen, folds=2)
