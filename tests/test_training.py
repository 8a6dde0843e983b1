"""Training runs: keys, resumption, repeatability, caches. Every model here is trained for real, on a tiny corpus."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mome_utils import artifacts, compilation, distillation, kd_training, recipes, runs, schedules, training
from mome_utils.artifacts import MissingArtifact
from mome_utils.config import MomeError, load_profile
from mome_utils.runs import run_key, teacher_states, train_or_load
from mome_utils.study import Study

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "expert": [1, 16, 2], "teacher_epochs": 0.1, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4,
    "evaluations": 3, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        study.build_data()
        teacher = study.runs([recipes.teacher_spec(study, 0)])
        study.cache_teachers(teacher)
        yield study


def weights(run, step=None):
    folder = run.folder if step is None else run.folder / "snapshots" / f"step-{step:06d}"
    # Copies: the loaded tensors are views of the file, and some tests here damage files.
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fresh(study, spec):
    """The run of a spec after forgetting what the store holds of it."""
    shutil.rmtree(study.store.path("runs", run_key(spec)), ignore_errors=True)
    return train_or_load(spec, study.store, study.data())


def test_a_run_is_repeatable_to_the_bit_and_learns(study):
    spec = recipes.student_spec(study, "en", "adaptive", 0)
    first = weights(fresh(study, spec))
    run = fresh(study, spec)
    assert same(first, weights(run))
    history = run.history()
    assert list(history["step"]) == list(range(1, spec.steps + 1))
    assert history["loss"].tail(5).mean() < history["loss"].head(5).mean()
    assert history["val_mean"].notna().sum() == spec.evaluations
    mixed = history["alpha"] * history["ce"] + (1 - history["alpha"]) * history["kd"]
    np.testing.assert_allclose(history["loss"], mixed, rtol=1e-5)


@pytest.mark.parametrize("arm", [arm for arm in recipes.arm_names() if arm != "ce"])
def test_every_arm_trains_and_its_loss_is_what_its_weights_say(study, arm):
    spec = recipes.student_spec(study, "py", arm, 0)
    history = train_or_load(spec, study.store, study.data()).history()
    assert np.isfinite(history["loss"]).all()
    assert history["loss"].tail(5).mean() < history["loss"].head(5).mean()
    parts = spec.objective.micro_batches
    names = [f"_{i}" for i in range(parts)] if parts > 1 else [""]
    weighed = []
    for name in names:
        alpha, ce, kd = (history[f"{column}{name}"].to_numpy() for column in ("alpha", "ce", "kd"))
        assert ((alpha >= 0) & (alpha <= 1)).all()
        weighed.append(np.where(alpha > 0, alpha * ce, 0) + np.where(alpha < 1, (1 - alpha) * kd, 0))
    np.testing.assert_allclose(history["loss"], np.mean(weighed, axis=0), rtol=1e-6)


def test_micro_batches_of_one_step_are_gradient_accumulation(study):
    """The released alternation in one pass, against a loop that accumulates gradients as the release does."""
    spec = dataclasses.replace(recipes.student_spec(study, "py", "alternating_micro", 0), steps=3, evaluations=1)
    run = fresh(study, spec)
    data, torch_model = study.data(), training.build_model(spec.model, spec.seed)
    blocks, states = data.block_array("train", "py"), teacher_states(
        study.store, data, study.runs([recipes.teacher_spec(study, 0)])[0], "py")
    head = study.runs([recipes.teacher_spec(study, 0)])[0].model().lm_head.weight.detach()
    order = schedules.schedule("balanced", {"py": len(blocks)}, steps=3, batch_size=4, seed=0)
    parts = [(True, False), (False, True)] * 2
    for step, row in enumerate(run.history().to_dict("records")[:1]):
        losses = []
        for (_, block), (with_ce, _) in zip(order[step], parts, strict=True):
            ids = torch.from_numpy(blocks[block : block + 1].astype(np.int64))
            logits = torch_model(input_ids=ids, use_cache=False).logits
            teacher = states[block : block + 1] @ head.to(states).T
            loss = (distillation.shifted_ce(logits, ids) if with_ce
                    else distillation.shifted_divergence("soft_ce", logits, teacher, ids))
            (loss / 4).backward()
            losses.append(loss.item())
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert [row[f"alpha_{i}"] for i in range(4)] == [1, 0, 1, 0]


def test_runs_on_topic_groups_see_no_block_of_the_others(study):
    data = study.data()
    group_of = dict(zip(data.table["id"], data.table["group"], strict=True))
    groups = sorted(set(data.table.loc[data.table["split"] == "train", "group"]))
    spec = dataclasses.replace(recipes.student_spec(study, "en", "fixed", 0), groups=tuple(
        group for group in sorted(set(group_of.values())) if group != groups[0]), snapshots=())
    kept = data.blocks_of_groups("train", "en", spec.groups)
    everything = range(len(data.block_array("train", "en")))
    assert 0 < len(kept) < len(everything)
    for block in everything:
        seen = {group_of[i] for i in data.blocks("train", "en")[block]["documents"]}
        assert (groups[0] in seen) == (block not in kept)
    assert run_key(spec) != run_key(dataclasses.replace(spec, groups=()))
    assert train_or_load(spec, study.store, data).metrics["validation_bits_per_byte"] > 0
    with pytest.raises(MomeError, match="No document belongs to the topic group 'magic'"):
        data.blocks_of_groups("train", "en", ["magic"])


def test_half_of_the_groups_is_held_out(study):
    groups = sorted(set(study.data().table["group"]))
    unseen = recipes.held_out_groups(study)
    assert unseen == tuple(groups[1::2])
    with pytest.raises(MomeError, match="chosen topic groups alone"):  # too small a corpus says so
        study.runs([dataclasses.replace(recipes.student_spec(study, "en", "fixed", 0), groups=(groups[0],))])


def test_a_batch_that_micro_batches_do_not_divide_is_refused(study):
    with pytest.raises(MomeError, match="cannot be cut into 4 equal micro-batches"):
        dataclasses.replace(recipes.student_spec(study, "en", "as_released", 0), batch_size=6)


def test_a_sweep_gives_what_each_run_gives_alone(study):
    specs = [recipes.student_spec(study, language, "fixed", 0) for language in ("en", "py")]
    alone = [weights(fresh(study, spec)) for spec in specs]
    for spec in specs:
            shutil.rmtree(study.store.path("runs", run_key(spec)))
    two = dataclasses.replace(study, profile=dataclasses.replace(study.profile, jobs=2))
    for before, run in zip(alone, two.runs(specs), strict=True):
        assert same(before, weights(run))


@pytest.mark.parametrize("kind", ["adaptive", "uncertainty", "alternating_micro", "sequential"])
def test_a_stopped_run_resumes_to_the_same_weights(study, monkeypatch, kind):
    if kind == "sequential":
        spec = recipes.sequential_spec(study, 0)
    else:
        spec = recipes.student_spec(study, "py", kind, 0)
    unbroken = fresh(study, spec)
    expected, history = weights(unbroken), unbroken.history()
    shutil.rmtree(unbroken.folder)
    step = training.LMTrainer.training_step
    stop_at = spec.steps * 2 // 3 + 1  # after the second checkpoint, between two
    seen = []

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
    for end in spec.snapshots:
        assert (resumed.folder / "snapshots" / f"step-{end:06d}" / "model.safetensors").is_file()
    assert not list((study.store.root / "runs").glob("*.unfinished"))


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        files = {"model.safetensors": artifacts.file_digest(folder / "model.safetensors")}
        (folder / "records.json").write_text(json.dumps({"records": [], "files": files, "state": {}}), encoding="utf-8")
    assert training.sound_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"cut")
    assert training.sound_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "records.json").unlink()
    assert training.sound_checkpoint(tmp_path) is None


def test_a_damaged_run_is_made_again(study):
    spec = recipes.student_spec(study, "en", "ce", 0)
    run = fresh(study, spec)
    expected = weights(run)
    (run.folder / "model.safetensors").write_bytes(b"not a model")
    assert same(expected, weights(train_or_load(spec, study.store, study.data())))


def test_a_changed_loss_trains_again_and_a_changed_figure_does_not(study, monkeypatch):
    spec = recipes.student_spec(study, "en", "fixed", 0)
    plain = recipes.student_spec(study, "en", "ce", 0)
    before, before_plain = run_key(spec), run_key(plain)
    real = artifacts.source_digest

    def edited(module):
        return lambda *names: "edited" if module in names else real(*names)

    monkeypatch.setattr(runs, "source_digest", edited("mome_utils.figures"))
    assert run_key(spec) == before
    for module in ("divergences", "alpha", "alpha_schedules", "distillation", "kd_training"):
        monkeypatch.setattr(runs, "source_digest", edited(f"mome_utils.{module}"))
        assert run_key(spec) != before
        assert run_key(plain) == before_plain, "a run without a teacher does not depend on the distillation losses"
    monkeypatch.setattr(runs, "source_digest", edited("mome_utils.fused"))
    assert run_key(spec) != before and run_key(plain) != before_plain


def test_specs_that_differ_have_different_keys(study):
    spec = recipes.student_spec(study, "en", "fixed", 0)
    others = [
        recipes.student_spec(study, "en", "fixed", 1), recipes.student_spec(study, "py", "fixed", 0),
        recipes.student_spec(study, "en", "adaptive", 0), dataclasses.replace(spec, threads=2),
        dataclasses.replace(spec, dtype="bfloat16"),
    ]
    assert len({run_key(s) for s in (spec, *others)}) == 6


def test_distillation_without_its_teacher_names_the_notebook(study):
    spec = dataclasses.replace(recipes.student_spec(study, "en", "fixed", 0), teacher="absent")
    with pytest.raises(MissingArtifact, match="02_teacher_training"):
        study.runs([spec])


def test_cached_states_give_the_teachers_logits_back(study):
    teacher = study.runs([recipes.teacher_spec(study, 0)])[0]
    states = teacher_states(study.store, study.data(), teacher, "py")
    blocks = torch.from_numpy(study.data().block_array("train", "py").astype(np.int64))
    model = teacher.model()
    with torch.inference_mode():
        exact = model(input_ids=blocks[-3:], use_cache=False).logits
    rebuilt = states[-3:].float() @ model.lm_head.weight.T
    assert states.dtype == torch.bfloat16 and len(states) == len(blocks)
    assert (rebuilt - exact).abs().max() < 0.02 * exact.abs().max()


def test_nothing_pickled_is_left(study):
    kept = {p.suffix for p in study.store.root.rglob("*") if p.is_file()}
    assert not kept & {".bin", ".pt", ".pth", ".pkl"}


def test_one_random_score_is_what_the_saved_model_gives(study):
    run = study.runs([recipes.multilingual_student_spec(study, 0)])[0]
    rows = study.score(run)
    row = rows.sample(1, random_state=np.random.default_rng(len(rows))).iloc[0]
    document = next(d for d in study.data().documents("test", row["language"]) if d.id == row["document"])
    data, model = study.data(), run.model()
    ids = [data.tokenizer.bos_token_id, *data.tokenizer(document.text)["input_ids"]]
    torch.set_num_threads(1)
    # One token at a time, with the context that the window of its token gives it: slow, and without shared code.
    nats, block, stride = 0.0, data.block_size, study.profile.stride
    for target in range(1, len(ids)):
        window = 0 if target < block else (target - block) // stride + 1
        context = torch.tensor([ids[window * stride : target]])
        with torch.inference_mode():
            logits = model(input_ids=context, use_cache=False).logits[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[target]].item()
    assert row["nats"] == pytest.approx(nats, rel=1e-4)
    assert row["bytes"] == len(document.text.encode())


@pytest.mark.parametrize(("rule", "micro_batches"), [
    ("fixed", 1), ("published_adaptive", 2), ("gradient_norm", 1), ("alternating", 1), ("published_alternating", 4),
])
def test_losses_in_chunks_train_as_whole_logits_do(study, rule, micro_batches, monkeypatch):
    goal = distillation.Objective("reverse_kl", rule, micro_batches=micro_batches)
    spec = dataclasses.replace(recipes.student_spec(study, "en", "fixed", 0), objective=goal, snapshots=())
    chunked = fresh(study, spec).history()
    monkeypatch.setattr(kd_training, "covers", lambda objective: False)
    whole = fresh(study, spec).history()
    assert list(chunked) == list(whole)
    np.testing.assert_allclose(chunked.to_numpy(), whole.to_numpy(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("variant", ["jeet", "moe_ce"])
def test_joint_experts_train_in_chunks_as_on_whole_logits(study, variant, monkeypatch):
    spec = recipes.moe_spec(study, variant, 0, "adaptive", mixed=True)  # every batch has several experts
    spec = dataclasses.replace(spec, steps=2 * spec.evaluations, snapshots=())
    chunked = fresh(study, spec).history()
    monkeypatch.setattr(training.LMTrainer, "hidden_states", lambda *_: None)
    whole = fresh(study, spec).history()
    np.testing.assert_allclose(chunked.to_numpy(), whole.to_numpy(), rtol=2e-3, atol=2e-4)


def test_a_compiled_run_learns_what_an_eager_one_does_and_has_a_key_of_its_own(study, monkeypatch):
    # The graph as the compiler gets it, run without generating code, which takes a minute here: `mome bench kd` does.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    spec = dataclasses.replace(recipes.student_spec(study, "en", "fixed", 0), snapshots=())
    compiled = dataclasses.replace(spec, compiled=True)
    assert run_key(spec) != run_key(compiled)
    eager = fresh(study, spec).history()
    np.testing.assert_allclose(fresh(study, compiled).history().to_numpy(), eager.to_numpy(), rtol=2e-3, atol=2e-4)


def test_a_profile_compiles_only_where_it_can(study, monkeypatch):
    assert not load_profile("laptop").compile and load_profile("gpu").compile
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert not compilation.resolve_compile(True)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    assert compilation.resolve_compile(True) and not compilation.resolve_compile(False)
