"""Continual runs: what a stage's start does, resumption, keys. Every model is trained for real, on a tiny corpus."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mome_utils import artifacts, continual, recipes, recipes_continual, runs, training
from mome_utils.artifacts import MissingArtifact
from mome_utils.config import MomeError
from mome_utils.continual import run_key, train_or_load
from mome_utils.study import Study

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "expert": [1, 16, 2], "teacher_epochs": 0.1, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4,
    "evaluations": 2, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        patch.setattr(continual, "FISHER_SEQUENCES", 8)
        study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        study.build_data()
        yield study


@pytest.fixture(scope="module")
def plain(study):
    """The sequential run that notebook 06 has always had."""
    return study.runs([recipes.sequential_spec(study, 0)])[0]


def weights(run, step=None):
    folder = run.folder if step is None else run.folder / "snapshots" / f"step-{step:06d}"
    return {name: t.clone() for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def course(study, arm):
    return recipes_continual.continual_spec(study, 0, arm)


@pytest.mark.parametrize("arm", ["replay_20", "ewc", "l2", "lwf", "rate_tenth", "fresh_start"])
def test_methods_share_the_first_stage_to_the_bit_and_differ_after_it(study, plain, arm):
    (run,) = study.runs([course(study, arm)])
    first, last = run.spec.stage_ends
    assert run.spec.snapshots == plain.spec.snapshots
    assert same(weights(run, first), weights(plain, first))
    assert not same(weights(run), weights(plain))
    assert same(weights(run, last), weights(run))
    history = run.history()
    assert list(history["step"]) == list(range(1, run.spec.steps + 1))
    assert np.isfinite(history["loss"]).all() and run.metrics["step"] == run.spec.steps
    if arm in ("ewc", "l2", "lwf"):
        later = history[history["step"] > first]
        assert history.loc[history["step"] <= first, "penalty"].isna().all()
        np.testing.assert_allclose(later["loss"], later["ce"] + later["penalty"], rtol=1e-6)
        if arm != "lwf":
            assert later["penalty"].iloc[0] == 0 and (later["penalty"].iloc[1:] > 0).all()


def test_a_plain_course_is_the_sequential_run_itself(study, plain):
    """The learning rate and the optimizer's state are as stated: the same numbers come out."""
    spec = recipes_continual._extended(plain.spec)
    run = train_or_load(spec, study.store, study.data())
    assert same(weights(run), weights(plain))
    assert run_key(spec) != run_key(plain.spec)


def test_a_strong_pull_holds_the_weights_and_a_weak_one_does_not(study, plain):
    far = []
    for strength in (1e-9, 1e9):
        spec = dataclasses.replace(course(study, "l2"), strength=strength)
        run = train_or_load(spec, study.store, study.data())
        before, after = weights(run, spec.stage_ends[0]), weights(run)
        far.append(sum(float((after[k] - before[k]).square().sum()) for k in after))
    assert far[1] < far[0] / 2
    free, start = weights(plain), weights(plain, plain.spec.snapshots[0])
    assert far[0] == pytest.approx(sum(float((free[k] - start[k]).square().sum()) for k in free), rel=1e-3)


def test_what_stages_do_to_the_learning_rate(study):
    def factors(spec):
        trainer = continual._trainer(spec, study.store.root / "spare", study.store, study.data())
        return np.array([trainer.rate_at(step) for step in range(spec.steps)])

    stage = course(study, "ewc").stage_steps
    constant = factors(course(study, "ewc"))
    assert constant[0] == 0 and (constant[stage:] == 1).all() and constant.max() == 1
    assert (factors(course(study, "rate_tenth"))[stage:] == 0.1).all()
    again = factors(course(study, "fresh_start"))
    assert (again[stage:] == again[:stage]).all() and again[stage] == 0
    shutil.rmtree(study.store.root / "spare", ignore_errors=True)


@pytest.mark.parametrize("arm", ["replay_20", "ewc", "lwf", "rate_tenth", "fresh_start", "frozen"])
def test_a_stopped_course_resumes_to_the_same_weights(study, monkeypatch, arm):
    spec = recipes_continual.growing_spec(study, 0, frozen=True) if arm == "frozen" else course(study, arm)
    unbroken = train_or_load(spec, study.store, study.data())
    expected, history = weights(unbroken), unbroken.history()
    shutil.rmtree(unbroken.folder)
    step, seen, stop_at = training.LMTrainer.training_step, [], spec.steps * 5 // 6

    def counted(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) > stop_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.LMTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(spec, study.store, study.data())
    assert not study.store.has("runs", run_key(spec))
    seen.clear()
    stop_at = spec.steps
    resumed = train_or_load(spec, study.store, study.data())
    assert 0 < len(seen) < spec.steps, "it went on from a checkpoint"
    assert same(expected, weights(resumed))
    assert resumed.history().equals(history)
    assert not list((study.store.root / "runs").glob("*.unfinished"))


def test_a_damaged_course_is_made_again(study):
    spec = course(study, "ewc")
    run = train_or_load(spec, study.store, study.data())
    expected = weights(run)
    (run.folder / "model.safetensors").write_bytes(b"not a model")
    assert same(expected, weights(train_or_load(spec, study.store, study.data())))


def test_a_growing_mixture_changes_one_expert_per_stage_and_what_is_shared_unless_frozen(study):
    for frozen in (True, False):
        (run,) = study.runs([recipes_continual.growing_spec(study, 0, frozen=frozen)])
        first, last = run.spec.stage_ends
        start = dict(training.build_model(run.spec.model, 0).state_dict())
        one, two = run.model(first).state_dict(), run.model(last).state_dict()
        for name in one:
            if name.startswith("experts.0"):
                assert torch.equal(one[name], two[name])
            elif name.startswith("experts.1"):
                assert torch.equal(start[name], one[name])
            elif name.startswith(continual.SHARED):
                assert torch.equal(one[name], two[name]) == frozen
        learned = [n for n in one if n.startswith("experts.1") and not torch.equal(one[n], two[n])]
        assert learned


def test_relearning_starts_where_the_course_ended(study, plain):
    again = recipes_continual.relearn_spec(study, 0, plain.key)
    scratch = recipes_continual.learn_spec(study, 0)
    assert again.languages == plain.spec.languages[:1] and again.steps == scratch.steps
    back, fresh = study.runs([again, scratch])
    assert len(back.history().dropna(subset=["val_mean"])) == again.evaluations
    first = [run.history()["loss"].iloc[0] for run in (back, fresh)]
    assert first[0] < first[1]
    with pytest.raises(MissingArtifact, match="06_forgetting_curves"):
        study.runs([dataclasses.replace(again, start="absent")])


def test_keys_hold_the_method_and_its_sources(study, monkeypatch, plain):
    specs = [course(study, arm) for arm in recipes_continual.COURSES]
    keys = {run_key(spec) for spec in specs}
    assert len(keys) == len(specs)
    assert run_key(plain.spec) == runs.run_key(plain.spec)
    before = {arm: run_key(course(study, arm)) for arm in ("ewc", "lwf")}
    real = artifacts.source_digest

    def edited(module):
        return lambda *names: "edited" if module in names else real(*names)

    for module, changed in [("continual_methods", {"ewc", "lwf"}), ("training", {"ewc", "lwf"}),
                            ("divergences", {"lwf"}), ("figures", set())]:
        monkeypatch.setattr(continual, "source_digest", edited(f"mome_utils.{module}"))
        assert {arm for arm, key in before.items() if run_key(course(study, arm)) != key} == changed


@pytest.mark.parametrize(("change", "sentence"), [
    ({"method": "hope"}, "no method 'hope'"),
    ({"strength": 0.0}, "cannot have strength"),
    ({"method": "replay", "strength": 1.5}, "must be below 1"),
    ({"lr_schedule": "cosine"}, "constant rate"),
    ({"select_best": True}, "keeps its last weights"),
    ({"sampler": "balanced"}, "sampler 'sequential'"),
    ({"snapshots": ()}, "after each stage"),
    ({"groups": ("history",)}, "all topic groups"),
    ({"freeze_shared": True}, "kind 'jeet'"),
])
def test_a_spec_that_cannot_be_run_says_why(study, change, sentence):
    with pytest.raises(MomeError, match=sentence):
        dataclasses.replace(course(study, "ewc"), **change)


def test_recipes_name_what_exists(study):
    with pytest.raises(MomeError, match="no course 'luck'"):
        course(study, "luck")
    with pytest.raises(MomeError, match="no session 'luck'"):
        recipes_continual.session_spec(study, 0, "luck")
    assert recipes_continual.session_spec(study, 0, "single_session") == recipes.multilingual_student_spec(study, 0)
    assert recipes_continual.orders(study) == (("en", "py"), ("py", "en"))
    four = Study.open("test", profile="smoke", quiet=True)
    found = recipes_continual.orders(four)
    assert found[0] == four.languages and found[1] == four.languages[::-1] and len(set(found)) == 3
    large = dataclasses.replace(four, profile=dataclasses.replace(four.profile, name="gpu"))
    every = recipes_continual.orders(large)
    assert len(set(every)) == len(every) == 24 and every[:2] == found[:2]
