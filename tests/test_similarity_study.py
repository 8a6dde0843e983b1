"""Models of a study beside each other: pairs, scores, tables of them, languages; on tiny models made here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest

from mome_utils import similarity_languages as across
from mome_utils import similarity_study as zoo
from mome_utils import similarity_tables as tables
from mome_utils.config import MomeError, Shape
from mome_utils.models import build_gpt2
from mome_utils.moe import build_mome
from mome_utils.representations import Passage, expert_reader, hidden_states
from mome_utils.similarity import MEASURES, compare
from mome_utils.similarity_baselines import ALL, jackknife
from mome_utils.training import ModelSpec

LANGUAGES, SEEDS, TOPICS = ("en", "py"), (0, 1, 2), 8
SIZES = dict(vocab_size=40, block_size=12, bos=0, eos=1)


@dataclass(frozen=True)
class Spec:
    seed: int
    model: ModelSpec


@dataclass(frozen=True)
class FakeRun:
    """A run whose training changed nothing but the seed of its weights."""

    spec: Spec
    trained: int

    def model(self) -> Any:
        return built(self.spec.model, self.trained)


def built(model: ModelSpec, seed: int) -> Any:
    if model.kind == "gpt2":
        return build_gpt2(model.shape, seed=seed, **SIZES).eval()
    return build_mome(model.kind, model.shape, languages=model.experts, seed=seed, **SIZES).eval()


def run(kind: str, seed: int, trained: int, layers: int = 1, width: int = 8) -> FakeRun:
    experts = () if kind == "gpt2" else LANGUAGES
    return FakeRun(Spec(seed, ModelSpec(kind, Shape(layers, width, 2), experts=experts, **SIZES)), trained)


@pytest.fixture(scope="module")
def models() -> zoo.Collection:
    generator = np.random.default_rng(0)
    passages = {g: [Passage(g, f"t{i // 3}", (0, *generator.integers(2, 40, 7).tolist())) for i in range(3 * TOPICS)]
                for g in LANGUAGES}
    found = zoo.Collection(passages, pad=1, folds=4, neighbours=5)
    for seed in SEEDS:
        found.add_run("teacher", "", run("gpt2", seed, seed, 2, 12))
        found.add_run("untrained_teacher", "", run("gpt2", seed, 0, 2, 12), untrained=True)
        for number, kind in enumerate(("ce", "fixed")):
            for g in LANGUAGES:
                found.add_run(kind, g, run("gpt2", seed, 10 * (number + 1) + seed))
        found.add_experts("moe_ce", run("moe_ce", seed, 30 + seed))
    return found


def test_untrained_twins_are_the_weights_of_the_start(models: zoo.Collection) -> None:
    trained, start = (models.states(models.of(kind, "en")[2], "en")["mean"][-1]
                      for kind in ("teacher", "untrained_teacher"))
    assert np.array_equal(trained, start)  # FakeRun(trained=seed) "trained" to what its seed starts with


def test_a_run_is_loaded_once_for_all_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    passages = {g: [Passage(g, f"t{i}", (0, *generator.integers(2, 40, 5).tolist())) for i in range(6)]
                for g in LANGUAGES}
    found, loads = zoo.Collection(passages, pad=1), []
    teacher, mixture = run("gpt2", 0, 1, 2, 12), run("moe_ce", 0, 30)
    found.add_run("teacher", "", teacher)
    found.add_experts("moe_ce", mixture)
    known = FakeRun.model
    monkeypatch.setattr(FakeRun, "model", lambda self: loads.append(self.trained) or known(self))
    wanted = [(ref, g) for g in LANGUAGES for kind in ("teacher", "moe_ce", "common")
              for ref in found.of(kind, g).values()]
    found.read([*wanted, *wanted])
    assert sorted(loads) == [1, 30]  # a mixture once for its experts, a teacher once for its languages
    ref, model = found.of("moe_ce", "py")[0], mixture.model()
    states = hidden_states(expert_reader(model, "py"), [p.ids for p in passages["py"]], pad=1)
    assert np.array_equal(found.states(ref, "py")["mean"][-1], states["mean"][-1])
    assert sorted(loads) == [1, 30, 30]


def test_no_model_takes_the_place_of_another(models: zoo.Collection) -> None:
    before = models.states(models.of("common", "en")[1], "en")["final"][-1]
    with pytest.raises(MomeError, match="a model of kind 'common', seed 1 already"):
        models.add_experts("untrained_moe_ce", run("moe_ce", 1, 31), untrained=True)
    models.add_experts("start_of_moe_ce", run("moe_ce", 1, 31), common="start", untrained=True)
    after, start = (models.states(models.of(kind, "en")[1], "en")["final"][-1] for kind in ("common", "start"))
    assert np.array_equal(before, after) and not np.array_equal(after, start)


def test_pairs_are_all_that_were_asked_for_and_no_other(models: zoo.Collection) -> None:
    own, other = (zoo.teacher_pairs(models, ["ce", "common"], own=flag) for flag in (True, False))
    assert len(own) == 2 * 2 * 3 and all(p.a.seed == p.b.seed and p.b.kind == "teacher" for p in own)
    assert len(other) == 2 * 2 * 6 and all(p.a.seed != p.b.seed for p in other)
    assert {p.a.made_for for p in own if p.a.kind == "ce" and p.language == "py"} == {"py"}
    between = zoo.seed_pairs(models, ["ce"])
    assert len(between) == len(set(between)) == 2 * 3 and all(p.a.seed < p.b.seed for p in between)
    assert len(zoo.kind_pairs(models, ["ce", "fixed", "common"])) == 2 * 3 * 9
    inside = zoo.expert_pairs(models, ["moe_ce"])
    assert len(inside) == 2 * 3 and all(p.a.made_for == p.language != p.b.made_for for p in inside)
    assert len(zoo.expert_pairs(models, ["moe_ce"], own=False)) == 2 * 6
    with pytest.raises(MomeError, match="no model of kind 'jeet' for 'en'"):
        models.of("jeet", "en")


def test_a_score_is_that_of_the_two_models_states(models: zoo.Collection) -> None:
    pair = zoo.teacher_pairs(models, ["fixed"])[4]
    rows = zoo.pair_rows(models, [pair], ["cka", "jaccard"], aggregations=["mean"])
    x, y = (models.states(ref, pair.language)["mean"][-1] for ref in pair[:2])
    whole = rows[rows["fold"] == ALL].set_index("measure")["value"]
    assert whole["cka"] == pytest.approx(compare("cka", x, y))
    assert whole["jaccard"] == pytest.approx(compare("jaccard", x, y, neighbours=5))
    assert sorted(rows["fold"].unique()) == [ALL, 0, 1, 2, 3]
    named = tuple(rows.iloc[0][["kind", "made_for", "seed", "kind_b"]])
    assert named == ("fixed", pair.language, pair.a.seed, "teacher")
    few = zoo.pair_rows(models, [pair], ["cka", "jaccard"], aggregations=["mean"], jackknifed=["cka"])
    assert set(few.loc[few["fold"] != ALL, "measure"]) == {"cka"}
    assert zoo.pair_rows(models, [pair], ["cka"], jackknifed=False)["fold"].eq(ALL).all()


def test_several_workers_give_the_rows_of_one(models: zoo.Collection) -> None:
    pairs = zoo.teacher_pairs(models, ["fixed", "moe_ce"])
    alone = zoo.pair_rows(models, pairs, ["cka", "jaccard"], jackknifed=["cka"])
    several = replace(models, workers=2)  # it has read by now: in threads, models would share torch's random numbers
    with joblib.parallel_config(backend="threading"):  # processes would first have to import torch
        together = zoo.pair_rows(several, pairs, ["cka", "jaccard"], jackknifed=["cka"])
    pd.testing.assert_frame_equal(together, alone)


def test_what_travels_to_a_worker_is_one_language_at_the_last_layer(models: zoo.Collection) -> None:
    first = zoo.teacher_pairs(models, ["fixed"])[0]
    part = models.last_layers([first.a], first.language, "mean")
    x, y = (each.space(first.a, first.language, "mean", fold=1).values for each in (models, part))
    assert np.array_equal(x, y)
    assert list(part.passages) == [first.language] and list(part.states(first.a, first.language)) == ["mean"]


def test_a_fold_leaves_whole_topics_out(models: zoo.Collection) -> None:
    ref = models.of("teacher", "en")[0]
    sizes = [len(models.space(ref, "en", "final", fold=fold)) for fold in range(4)]
    assert sizes == [18] * 4  # two of eight topics, three passages each
    assert len(models.space(ref, "en", "final")) == 24


def test_layers_are_compared_with_layers(models: zoo.Collection) -> None:
    pair = zoo.teacher_pairs(models, ["ce"])[0]
    rows = zoo.layer_rows(models, [pair], ["cka"], aggregations=["final"])
    assert rows[["layer", "layer_b"]].apply(tuple, axis=1).tolist() == [(i, j) for i in range(2) for j in range(3)]
    last = zoo.pair_rows(models, [pair], ["cka"], aggregations=["final"], jackknifed=False)["value"].iloc[0]
    assert rows["value"].iloc[-1] == last


# ------------------------------------------------------------------------------------------------------------- tables


def table(scores: dict[tuple[str, int, str, int], float], *, name: str = "cka", folds: int = 3) -> pd.DataFrame:
    """Rows of pairs (kind, seed, kind_b, seed_b) in two languages, the second 0.1 lower, folds a little apart."""
    return pd.DataFrame([
        {"kind": a, "made_for": g, "seed": i, "kind_b": b, "made_for_b": g, "seed_b": j, "language": g,
         "aggregation": "final", "measure": name, "fold": fold, "value": value - 0.1 * n + 0.001 * (fold + 1)}
        for (a, i, b, j), value in scores.items() for n, g in enumerate(LANGUAGES) for fold in (ALL, *range(folds))
    ])


def test_means_give_every_language_the_same_weight() -> None:
    rows = table({("ce", 0, "teacher", 0): 0.5, ("ce", 0, "teacher", 1): 0.9}, folds=0)
    assert tables.mean_of("ce")(rows) == pytest.approx(0.65)
    assert tables.mean_of("ce", "teacher", True)(rows) == pytest.approx(0.45)
    assert tables.mean_of("ce", "teacher", False)(rows) == pytest.approx(0.85)
    assert np.isnan(tables.mean_of("fixed")(rows)) and np.isnan(tables.mean_of("ce", "jeet")(rows))
    uneven = pd.concat([rows, rows[rows["language"] == "en"]])
    assert tables.mean_of("ce")(uneven) == pytest.approx(0.65)


def test_places_and_their_differences() -> None:
    scores = {("ce", s, "teacher", s): 0.5 for s in SEEDS}
    scores |= {("fixed", s, "teacher", s): 0.7 + 0.01 * s for s in SEEDS}
    scores |= {("teacher", i, "teacher", j): 0.95 for i in SEEDS for j in SEEDS if i < j}
    floors = table({("ce", 0, "teacher", 0): 0.1}, folds=0)
    rows = tables.placed_rows(table(scores), floors, ["ce", "fixed"], SEEDS).set_index("kind")
    assert rows.loc["ce", "value"] == pytest.approx((0.45 - 0.05) / (0.9 - 0.05))
    assert rows.loc["ce", "ceiling"] == pytest.approx(0.9) and rows.loc["ce", "floor"] == pytest.approx(0.05)
    gap = tables.placed_rows(table(scores), floors, ["fixed"], SEEDS, versus="ce").iloc[0]
    assert gap["value"] == pytest.approx(0.21 / 0.85)
    assert 0 < gap["low"] < gap["value"] < gap["high"]
    single = tables.placed_rows(table({("ce", 0, "teacher", 0): 0.5}), floors, ["ce"], [0]).iloc[0]
    assert single["ceiling"] == 1  # one seed: two identical models are the ceiling
    flat = tables.placed_rows(table({("ce", 0, "teacher", 0): 1.1}), floors.assign(value=1.0), ["ce"], [0])
    assert np.isnan(flat["value"].iloc[0])


def kinds_table(
    apart: float, within: float, same_start: float, name: str = "cka", other: float | None = None
) -> pd.DataFrame:
    own = {"a": within, "b": within if other is None else other}
    scores = {(k, i, k, j): own[k] for k in own for i in SEEDS for j in SEEDS if i < j}
    return table(scores | {("a", i, "b", j): same_start if i == j else apart for i in SEEDS for j in SEEDS}, name=name)


def test_the_share_below_the_ceiling_does_not_look_at_models_of_one_seed() -> None:
    share = tables.share_below("cka")
    for apart, expected in ((0.7, 1.0), (0.9, 0.0)):
        rows = kinds_table(apart, 0.8, 1.0)
        assert share(rows[rows["fold"] == ALL]) == expected
    assert tables.share_below("angular")(kinds_table(0.9, 0.8, 0.0, "angular").query("fold == -1")) == 1.0
    between_both = kinds_table(0.7, 0.8, 1.0, other=0.65)  # alike as two seeds of the second kind, if not of the first
    assert share(between_both[between_both["fold"] == ALL]) == 0.0
    one = kinds_table(0.7, 0.8, 1.0).query("seed == 0 and seed_b == 0")
    assert np.isnan(share(one))
    found = jackknife(kinds_table(0.7, 0.8, 1.0), share, SEEDS)
    assert (found.estimate, found.seeds) == (1.0, 3)


def test_the_matrix_of_kinds_holds_the_ceiling_on_its_diagonal() -> None:
    rows = kinds_table(0.7, 0.8, 0.95)
    assert tables.kind_matrix(rows, ["a", "b"]).to_numpy() == pytest.approx(np.array([[0.75, 0.65], [0.65, 0.75]]))
    assert tables.kind_matrix(rows, ["b", "a"], same_seed=True).loc["a", "b"] == pytest.approx(0.9)
    with pytest.raises(MomeError, match="not compared"):
        tables.kind_matrix(rows, ["a", "c"])


def test_measures_that_rank_alike_agree_whatever_their_direction() -> None:
    generator, parts = np.random.default_rng(0), []
    base = generator.normal(size=9)
    scored = {"cka": base, "angular": -base**3, "jaccard": generator.normal(size=9), "cca": np.ones(9)}
    for name, values in scored.items():
        scores = {("a", i, "b", j): values[3 * i + j] for i in SEEDS for j in SEEDS}
        parts.append(table(scores, name=name, folds=0))
    found = tables.measure_agreement(pd.concat(parts, ignore_index=True))
    assert list(found.index) == ["cka", "angular", "jaccard"]  # mean CCA ranks nothing here
    assert found.loc["cka", "angular"] == pytest.approx(1)
    ranks = pd.DataFrame({p["measure"].iloc[0]: p["value"].to_numpy() for p in parts}).corr("spearman")
    assert found.loc["cka", "jaccard"] == pytest.approx(ranks.loc["cka", "jaccard"], abs=0.2)
    assert np.diag(found) == pytest.approx(np.ones(3))


def test_a_conclusion_flips_where_two_settings_contradict_each_other() -> None:
    effects = pd.DataFrame([
        {"question": q, "measure": m, "aggregation": "final", "low": low, "high": high}
        for q, m, low, high in (("x", "cka", 0.1, 0.2), ("x", "rsa", -0.2, -0.1), ("x", "jaccard", 0.1, 0.3),
                                ("y", "cka", 0.1, 0.2), ("y", "rsa", -0.1, 0.1))
    ])
    found = tables.flips(effects).set_index("question")
    assert found.loc["x", ["more", "less", "undecided"]].tolist() == [2, 1, 0]
    assert found.loc["x", "flips"] and found.loc["x", "minority"] == "RSA (final)"
    assert not found.loc["y", "flips"] and found.loc["y", "minority"] == "–"


# ----------------------------------------------------------------------------------------------------------- languages


def test_retrieval_counts_the_places_of_the_right_candidates() -> None:
    queries = np.eye(4)
    candidates = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0.5]])
    assert across.retrieval_ranks(queries, candidates, centre=False).tolist() == [1, 1, 1, 1]
    assert across.retrieval_ranks(queries, candidates[[1, 0, 2, 3]], centre=False).tolist() == [2, 4, 1, 1]
    assert across.retrieval_ranks(queries, np.ones((4, 4)), centre=False).tolist() == [4] * 4  # all alike
    with pytest.raises(MomeError, match="one shape"):
        across.retrieval_ranks(queries, candidates[:3])


def test_centring_takes_off_what_a_language_has_in_common() -> None:
    generator = np.random.default_rng(0)
    topics = generator.normal(size=(30, 6))
    offset = 40 * generator.normal(size=6)
    assert across.retrieval_ranks(topics, topics + offset).max() == 1
    assert across.retrieval_ranks(topics, topics + offset, centre=False).max() > 5


def test_topics_are_matched_by_name_and_read_by_each_languages_model(models: zoo.Collection) -> None:
    assert across.common_topics(models) == [f"t{i}" for i in range(TOPICS)]
    refs = {g: models.of("moe_ce", g)[1] for g in LANGUAGES}
    clouds = across.topic_clouds(models, refs, "mean", -1)
    states = models.states(refs["py"], "py")["mean"][-1]
    assert clouds["py"][2] == pytest.approx(states[6:9].mean(0), abs=1e-6)
    readers = {"moe_ce": {1: refs}}
    rows = across.language_rows(models, readers, ["cka"], draws=2)
    whole = rows[(rows["kind"] == "moe_ce") & (rows["fold"] == ALL)].set_index("layer")["value"]
    assert whole[1] == pytest.approx(compare("cka", clouds["en"], clouds["py"]))
    assert set(rows["kind"]) == {"moe_ce", "permuted moe_ce"} and set(rows["fold"]) == {ALL, 0, 1, 2, 3}
    sought = across.retrieval_rows(models, readers)
    part = sought[(sought["layer"] == 1) & sought["centred"] & (sought["language"] == "en")]
    assert part["rank"].tolist() == across.retrieval_ranks(clouds["en"], clouds["py"]).tolist()
    assert part["reciprocal"].tolist() == pytest.approx((1 / part["rank"]).tolist())


def test_texts_without_common_topics_are_not_matched() -> None:
    passages = {g: [Passage(g, f"{g}{i}", (0, 2)) for i in range(9)] for g in LANGUAGES}
    apart = zoo.Collection(passages, pad=1)
    assert across.common_topics(apart) == []
    with pytest.raises(MomeError, match="share too few topics"):
        across.topic_clouds(apart, {}, "mean", 0)
    assert across.common_topics(zoo.Collection({"en": passages["en"]}, pad=1)) == []


def test_the_modules_that_key_the_tables_are_all_there() -> None:
    assert all(entry.function.__module__ in zoo.SIMILARITY_MODULES for entry in MEASURES.values())
