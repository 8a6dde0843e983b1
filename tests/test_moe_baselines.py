"""Rivals of a mixture: soft ensembles and soups, their tables, and recipes of equal size."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils import recipes
from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import encode_documents, paired_interval, score_documents, window_batches
from mome_utils.models import build_gpt2, parameter_count
from mome_utils.moe import MomeForCausalLM, build_mome
from mome_utils.moe_baselines import (
    causal,
    causal_logprobs,
    expert_scorers,
    score_ensembles,
    score_soup,
    soft_name,
    soft_probabilities,
    soup,
    top_weights,
)
from mome_utils.moe_settings import score_settings, setting_parameters, settings
from mome_utils.moe_tables import advantages, against, relative_times, saved_rows, scores_by_arm
from mome_utils.router_fit import fit_router
from mome_utils.runs import run_key
from mome_utils.study import Study
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)
LANGUAGES = ("en", "fr", "de")
WORDS = {"en": "the cat sat on a mat", "fr": "le chat est sur une natte", "de": "die Katze ist auf der Matte"}
BLOCK, STRIDE = 24, 12


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document(f"t{i}", g, "", "", f"{WORDS[g]} {i} " * (2 + i)) for i in range(3) for g in LANGUAGES]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer([d.text for d in documents], 300)


def gpt2(tokenizer, seed: int, noise: float = 0.2):
    model = build_gpt2(Shape(1, 16, 2), vocab_size=len(tokenizer), block_size=BLOCK, seed=0,
                       bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def router(tokenizer, documents):
    texts = {g: [ids for ids, d in zip(encode_documents(tokenizer, documents), documents, strict=True)
                 if d.language == g] for g in LANGUAGES}
    return fit_router(texts, len(tokenizer))


@pytest.fixture(scope="module")
def ple(tokenizer, router) -> MomeForCausalLM:
    return MomeForCausalLM.from_experts({g: gpt2(tokenizer, i) for i, g in enumerate(LANGUAGES)}, router).eval()


@pytest.fixture(scope="module")
def rows(ple, router, tokenizer, documents) -> pd.DataFrame:
    return score_ensembles(expert_scorers(ple), router, tokenizer, documents, block_size=BLOCK, stride=STRIDE)


def test_hard_routes_are_scored_as_by_the_settings(rows, ple, tokenizer, documents):
    known = score_settings(ple, tokenizer, documents, block_size=BLOCK, stride=STRIDE)
    for setting in ("routed", "routed, true language"):
        ours, theirs = (t[t["setting"] == setting].reset_index(drop=True) for t in (rows, known))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)


def test_the_soft_ensemble_is_the_mean_of_probabilities(rows, ple, router, tokenizer, documents):
    """One short document, computed another way: token by token, in probabilities."""
    place = next(i for i, d in enumerate(documents) if d.language == "fr")
    ids = torch.tensor(encode_documents(tokenizer, documents)[place])[None]
    assert ids.shape[1] <= BLOCK
    probability = router.probabilities(ids)[0]
    kept = probability.argsort(descending=True)[:2].tolist()
    with torch.inference_mode():
        answers = [ple(ids, routes=torch.tensor([i])).logits[0, :-1].double().softmax(-1) for i in kept]
    mixed = sum(probability[i] * p for i, p in zip(kept, answers, strict=True)) / probability[kept].sum()
    nats = -sum(float(mixed[t, token].log()) for t, token in enumerate(ids[0, 1:]))
    found = rows[(rows["setting"] == "soft top-2") & (rows["document"] == documents[place].id)
                 & (rows["language"] == "fr")]
    assert found["nats"].item() == pytest.approx(nats, rel=1e-5)
    assert found["tokens"].item() == ids.shape[1] - 1


def test_the_top_one_is_the_hard_route_and_one_expert_for_all_needs_no_router(ple, router, tokenizer, documents):
    size = {"block_size": BLOCK, "stride": STRIDE}
    one = score_ensembles(expert_scorers(ple), router, tokenizer, documents, top=1, **size)
    parts = {name: part["nats"].to_numpy() for name, part in one.groupby("setting")}
    np.testing.assert_allclose(parts[soft_name(1)], parts["routed"], rtol=1e-6)
    calls = []
    model = gpt2(tokenizer, 7)

    def counted(batch):
        calls.append(len(batch.ids))
        return causal_logprobs(model, batch)

    same = score_ensembles(dict.fromkeys(LANGUAGES, counted), router, tokenizer, documents, **size)
    assert sum(calls) == sum(len(batch.ids) for batch in window_batches(tokenizer, documents, BLOCK, STRIDE))
    alone = score_documents(lambda ids: causal(model, ids), tokenizer, documents, **size)
    for _, part in same.groupby("setting"):
        np.testing.assert_allclose(part["nats"], alone["nats"], rtol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_model_that_is_timed_answers_as_the_soft_ensemble_that_is_scored(top, ple, router, tokenizer, documents):
    """A document of one window each: the scores of the ensemble are those of the probabilities of its batch."""
    short = [d for d in documents if len(encode_documents(tokenizer, [d])[0]) <= BLOCK]
    assert {d.language for d in short} == set(LANGUAGES)
    scored = score_ensembles(expert_scorers(ple), router, tokenizer, short, block_size=BLOCK, stride=STRIDE, top=top)
    scored = scored[scored["setting"] == soft_name(top)].set_index(["language", "document"])["nats"]
    for document, tokens in zip(short, encode_documents(tokenizer, short), strict=True):
        ids = torch.tensor(tokens)[None].repeat(2, 1)
        found = soft_probabilities(ple, ids, top)
        torch.testing.assert_close(found.sum(-1), torch.ones(ids.shape))
        nats = -found[1, :-1].gather(1, ids[1, 1:, None]).log().sum().item()
        assert nats == pytest.approx(scored[document.language, document.id], rel=1e-4)


def test_only_the_kept_experts_of_a_sequence_run(ple, tokenizer, documents, monkeypatch):
    seen = []
    plain = MomeForCausalLM.expert_hidden
    monkeypatch.setattr(MomeForCausalLM, "expert_hidden",
                        lambda self, name, ids: seen.append(len(ids)) or plain(self, name, ids))
    ids = torch.tensor([tokens[:8] for tokens in encode_documents(tokenizer, documents)])
    soft_probabilities(ple, ids, 2)
    assert sum(seen) == 2 * len(ids)
    with pytest.raises(MomeError, match="keeps 1 to all of them, not 4"):
        soft_probabilities(ple, ids, 4)


def test_top_weights_keep_the_largest_and_add_up():
    weights = top_weights(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64), 2)
    torch.testing.assert_close(weights[0], torch.tensor([0.625, 0.0, 0.375], dtype=torch.float64))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"), [({"experts": ("en", "fr")}, "No expert answers for de"), ({"top": 4}, "keeps 1 to all")]
)
def test_an_ensemble_that_cannot_be_is_refused_in_one_sentence(ple, router, tokenizer, documents, change, message):
    experts = {g: expert_scorers(ple)[g] for g in change.pop("experts", LANGUAGES)}
    with pytest.raises(MomeError, match=message) as error:
        score_ensembles(experts, router, tokenizer, documents, block_size=BLOCK, stride=STRIDE, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["ple", "jeet", "moe_ce"])
def test_a_soup_has_the_mean_weights_and_leaves_its_source_alone(variant, tokenizer):
    model = build_mome(variant, Shape(1, 16, 2), vocab_size=len(tokenizer), block_size=BLOCK, languages=LANGUAGES,
                       seed=0, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    before = copy.deepcopy(model.state_dict())
    experts = {i: dict(expert.named_parameters())
               for i, expert in enumerate(model.experts)}
    for name, value in soup(model).experts[1].named_parameters():
        expected = sum(own[name] for own in experts.values()) / len(experts)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_soup_of_equal_experts_is_each_of_them(tokenizer, documents, router):
    model = gpt2(tokenizer, 3)
    same = MomeForCausalLM.from_experts(dict.fromkeys(LANGUAGES, model), router).eval()
    size = {"block_size": BLOCK, "stride": STRIDE}
    found = score_soup(same, tokenizer, documents, **size)
    alone = score_documents(lambda ids: causal(model, ids), tokenizer, documents, **size)
    np.testing.assert_allclose(found["nats"], alone["nats"], rtol=1e-5)
    assert set(found["setting"]) == {"soup"}


# --- tables


def two_arms() -> dict[str, pd.DataFrame]:
    generator = np.random.default_rng(0)
    base = pd.DataFrame([{"seed": s, "language": g, "document": f"t{d}", "bytes": 100, "tokens": 30}
                         for s in range(3) for g in LANGUAGES for d in range(6)])
    base["nats"] = 100 + 10 * generator.random(len(base))
    return {"a": base, "b": base.assign(nats=base["nats"] + 100 * np.log(2) * 0.25)}


def test_differences_from_the_reference_are_exact_where_nothing_varies():
    arms = two_arms()
    table = against(arms, "a", LANGUAGES)
    assert list(table["language"]) == [*LANGUAGES, "mean"] and set(table["arm"]) == {"b"}
    np.testing.assert_allclose(table[["estimate", "low", "high"]], 0.25, atol=1e-9)
    wide = scores_by_arm(arms, LANGUAGES)
    np.testing.assert_allclose(wide.loc["b"] - wide.loc["a"], 0.25)
    assert wide.loc["a", "mean"] == pytest.approx(wide.loc["a", list(LANGUAGES)].mean())
    with pytest.raises(MomeError, match="no arm 'c'"):
        against(arms, "c", LANGUAGES)


def test_the_advantage_is_that_of_the_right_expert_over_the_mean_of_the_wrong():
    base = two_arms()["a"]
    dearer = {"en": 0.0, "fr": 0.1, "de": 0.3}  # what each expert costs beside the others, in bits per byte
    scores = pd.concat([
        base.assign(setting=f"{h} alone", nats=base["nats"] + 100 * np.log(2) * (dearer[h] + (base["language"] != h)))
        for h in LANGUAGES
    ])
    found = advantages(scores, "{} alone", LANGUAGES).set_index("language")["estimate"]
    for g in LANGUAGES:
        wrong = np.mean([dearer[h] for h in LANGUAGES if h != g])
        assert found[g] == pytest.approx(1 + wrong - dearer[g])
    assert found["mean"] == pytest.approx(1.0)
    saved = saved_rows(scores, "{} alone", LANGUAGES)
    assert len(saved) == len(base)
    for g, part in saved.groupby("language"):
        assert part["nats"].sum() / part["bytes"].sum() / np.log(2) == pytest.approx(found[g])


def test_a_difference_of_advantages_is_paired_and_exact_where_nothing_varies():
    base, other = two_arms()["a"], two_arms()["a"]
    other = other.assign(nats=other["nats"] * 1.5)  # another mixture, whose documents are dearer

    def experts(rows, worth):  # a wrong expert costs `worth` bits per byte more than the right one
        return pd.concat([rows.assign(setting=f"{h} alone",
                                      nats=rows["nats"] + 100 * np.log(2) * worth * (rows["language"] != h))
                          for h in LANGUAGES])

    a, b = (saved_rows(experts(rows, worth), "{} alone", LANGUAGES) for rows, worth in ((base, 0.5), (other, 0.75)))
    effect = paired_interval(a, b)
    np.testing.assert_allclose([effect.estimate, effect.low, effect.high], -0.25, atol=1e-9)


def test_times_are_ratios_to_the_baseline():
    now = [0.0]

    def takes(seconds):
        def work():
            now[0] += seconds
        return work

    functions = {"one": takes(1.0), "three": takes(3.0)}
    table = relative_times(functions, "one", rounds=3, clock=lambda: now[0]).set_index("arm")
    assert table.loc["one", "ratio"] == 1
    np.testing.assert_allclose(table.loc["three"], 3)
    assert table["seconds"].tolist() == pytest.approx([1, 3])
    with pytest.raises(MomeError, match="no function 'two'"):
        relative_times(functions, "two")


def test_parameters_of_a_setting_are_those_that_it_asks(tokenizer):
    counts = {}
    for variant in ("ple", "moe_ce"):
        model = build_mome(variant, Shape(1, 16, 2), vocab_size=len(tokenizer), block_size=BLOCK, languages=LANGUAGES,
                           seed=0, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
        counts[variant] = {s.name: setting_parameters(model, s) for s in settings(model.config)}
    one, whole = parameter_count(gpt2(tokenizer, 0)), parameter_count(model)
    assert counts["ple"]["routed"] == {"total": 3 * one, "active": one}
    assert counts["ple"]["all averaged"] == {"total": 3 * one, "active": 3 * one}
    assert counts["ple"]["fr+de routed"] == {"total": 2 * one, "active": one}
    joint = counts["moe_ce"]
    assert joint["routed, with common"] == model.parameter_counts()
    expert = joint["routed"]["total"] - joint["en+de routed"]["total"]
    assert joint["common alone"]["total"] == whole - 3 * expert
    assert joint["en alone, with common"]["active"] == joint["common alone"]["active"] + expert


# --- recipes


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """A study of four languages with a data set, and nothing trained."""
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    for language, word in (("en", "word"), ("fr", "mot"), ("de", "Wort"), ("py", "name")):
        folder = tmp_path / "texts" / language
        folder.mkdir(parents=True)
        for topic in range(12):
            text = "\n\n".join(f"{word} {topic} {part} " * 30 for part in range(4))
            (folder / f"t{topic:02d}.txt").write_text(text, encoding="utf-8")
    overrides = {"vocab_size": 300, "block_size": 32, "stride": 16, "test_fraction": 0.2, "validation_fraction": 0.2}
    study = Study.open("test", profile="smoke", corpus=str(tmp_path / "texts"), languages=["en", "fr", "de", "py"],
                       overrides=overrides, quiet=True)
    study.build_data()
    return study


@pytest.mark.parametrize("shape", [Shape(1, 16, 2), Shape(3, 24, 3)])
def test_parameters_are_counted_without_a_model(shape):
    model = build_gpt2(shape, vocab_size=50, block_size=12, seed=0, bos=0, eos=1)
    assert recipes.gpt2_parameters(shape, 50, 12) == parameter_count(model)


@pytest.mark.parametrize(("count", "sizes"), [(1, [4]), (2, [2, 2]), (3, [1, 2, 1]), (4, [1, 1, 1, 1])])
def test_groups_hold_every_language_once(count, sizes):
    groups = recipes.expert_groups(("en", "fr", "de", "py"), count)
    assert [len(g) for g in groups] == sizes
    assert [g for group in groups for g in group] == ["en", "fr", "de", "py"]
    with pytest.raises(MomeError, match="1 to 4 groups"):
        recipes.expert_groups(("en", "fr", "de", "py"), 5)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_models_of_equal_total_size_differ_by_a_few_per_cent(study, experts):
    vocabulary, block = len(study.data().tokenizer), study.profile.block_size
    shape = recipes.matched_shape(study, experts)
    whole = len(study.languages) * recipes.gpt2_parameters(study.profile.student, vocabulary, block)
    assert experts * recipes.gpt2_parameters(shape, vocabulary, block) == pytest.approx(whole, rel=0.05)
    assert shape.width % shape.heads == 0 and shape.layers == study.profile.student.layers
    if experts == len(study.languages):
        assert shape == study.profile.student


def test_rivals_learn_from_as_many_sequences_as_the_students(study):
    students = [recipes.student_spec(study, g, "fixed", 0) for g in study.languages]
    sequences = sum(s.steps * s.batch_size for s in students)
    rounding = study.profile.evaluations * recipes.dense_spec(study, 0, total=True).batch_size
    pair = [recipes.group_expert_spec(study, g, 0, experts=2) for g in recipes.expert_groups(study.languages, 2)]
    mixed = [recipes.moe_spec(study, v, 0, mixed=True) for v in ("jeet", "moe_ce")]
    dense = [recipes.dense_spec(study, 0, total=total) for total in (False, True)]
    for specs in (pair, *([spec] for spec in (*mixed, *dense))):
        assert abs(sum(s.steps * s.batch_size for s in specs) - sequences) <= len(students) * rounding
        assert all(s.sampler == "balanced" and s.teacher == students[0].teacher for s in specs)
        assert all(s.objective == students[0].objective for s in specs)
        assert all(s.batch_size % len(s.languages) == 0 for s in specs)
    published = recipes.moe_spec(study, "jeet", 0)
    assert published.sampler == "one_language"
    assert dataclasses.replace(published, sampler="balanced") == mixed[0]  # nothing else differs


def test_the_small_dense_model_is_the_multilingual_student_of_notebook_03(study):
    assert run_key(recipes.dense_spec(study, 0, total=False)) == run_key(
        recipes.multilingual_student_spec(study, 0, "fixed"))
    assert recipes.group_expert_spec(study, ["en"], 0, experts=len(study.languages)) == recipes.student_spec(
        study, "en", "fixed", 0)
