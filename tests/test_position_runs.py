"""Runs, scores and tables of notebook 08 on tiny data: made once, equal to counts and moves by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils import figures_position, position_recipes, position_tables
from mome_utils.artifacts import MissingArtifact, Store
from mome_utils.config import MomeError, Shape, load_profile
from mome_utils.corpus import load_corpus
from mome_utils.dataset import build_dataset
from mome_utils.figures_style import FigureError
from mome_utils.intervals import IntervalError
from mome_utils.models import IGNORED
from mome_utils.position_models import load_classifier
from mome_utils.position_runs import (
    STAGE,
    ClassifySpec,
    LanguageModelling,
    PretrainSpec,
    load_task,
    run_key,
    stored_task,
    train_or_load,
)
from mome_utils.position_scores import SPAN, attention_to_copies, count_matches, score_job, score_places
from mome_utils.position_tasks import Task, TaskSpec, make_task, task_from_folder
from mome_utils.study_data import StudyData


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    folder = tmp_path_factory.mktemp("data") / "set"
    profile = load_profile("smoke", {"topics": 30})
    build_dataset(load_corpus("embedded", ["en", "py"], topics=30), profile, folder)
    return StudyData.load(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def pretrain(data: StudyData, **changes: object) -> PretrainSpec:
    spec = PretrainSpec(data.fingerprint, ("en", "py"), "absolute", False, Shape(1, 16, 2), 3, 2, 1e-3, 0, 1)
    return dataclasses.replace(spec, **changes)


@pytest.fixture(scope="module")
def task_key(data: StudyData, store: Store) -> str:
    return stored_task(TaskSpec("code", ("py",), 15, 60, 12), store, data)


@pytest.fixture(scope="module")
def classify(data: StudyData, store: Store, task_key: str) -> ClassifySpec:
    start = train_or_load(pretrain(data), store, data)
    return ClassifySpec(data.fingerprint, task_key, start.key, STAGE, ("plain", "rps"), 3, 4, 1e-3, 64, 0, 1)


# --- tasks and runs


def test_a_task_is_stored_and_comes_back(data: StudyData, store: Store, task_key: str) -> None:
    spec = TaskSpec("code", ("py",), 15, 60, 12)
    assert load_task(store, task_key) == make_task(spec, data)
    made = store.path("position_tasks", task_key) / "manifest.json"
    before = made.stat().st_mtime_ns
    assert stored_task(spec, store, data) == task_key and made.stat().st_mtime_ns == before
    (made.parent / "task.json").write_text("{}", encoding="utf-8")
    assert stored_task(spec, store, data) == task_key  # damaged: made again
    assert load_task(store, task_key).labels[0] == "keyword"
    with pytest.raises(MissingArtifact, match="08_position_bias"):
        load_task(store, "nothing")


def test_half_of_the_sentences_to_learn_spans_from_hold_one(data: StudyData) -> None:
    task = make_task(TaskSpec("entities", ("en",), 15, 40, 30), data)
    some = sum(any(map(task.positive, s.labels)) for s in task.train)
    assert task.spans and some == len(task.train) // 2 == 20
    words = make_task(TaskSpec("words", ("en",), 15, 40, 30), data)
    assert not words.spans and {words.labels[i] for s in words.train for i in s.labels if i >= 0} >= {"word", "name"}


def test_masked_language_modelling_as_in_bert() -> None:
    ids = torch.arange(5, 405).repeat(50, 1)
    made = LanguageModelling(causal=False, mask=0, vocab_size=500, share=0.15, seed=0)({"input_ids": ids})
    asked = made["labels"] != IGNORED
    assert (made["labels"][asked] == ids[asked]).all() and (made["input_ids"][~asked] == ids[~asked]).all()
    masked, same = made["input_ids"][asked] == 0, made["input_ids"][asked] == ids[asked]
    assert abs(asked.float().mean() - 0.15) < 0.01
    assert abs(masked.float().mean() - 0.8) < 0.02 and abs(same.float().mean() - 0.1) < 0.02
    causal = LanguageModelling(causal=True, mask=0, vocab_size=500, share=0.15, seed=0)({"input_ids": ids})
    assert (causal["labels"][:, :-1] == ids[:, 1:]).all() and (causal["labels"][:, -1] == IGNORED).all()


def test_a_run_is_made_once_and_the_same_each_time(
    data: StudyData, store: Store, classify: ClassifySpec, tmp_path: Path
) -> None:
    run = train_or_load(classify, store, data)
    assert len(run.history()) == 6 and np.isfinite(run.history()["loss"]).all()  # two steps on each of three batches
    made = (run.folder / "manifest.json").stat().st_mtime_ns
    assert (train_or_load(classify, store, data).folder / "manifest.json").stat().st_mtime_ns == made
    other = Store(tmp_path)
    stored_task(TaskSpec("code", ("py",), 15, 60, 12), other, data)
    train_or_load(pretrain(data), other, data)
    again = train_or_load(classify, other, data)
    pairs = zip(run.model().state_dict().values(), again.model().state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (run.folder / "history.parquet").write_bytes(b"broken")
    assert len(train_or_load(classify, store, data).history()) == 6  # damaged: made again


def test_keys_tell_runs_apart_and_arms_share_their_batches(
    data: StudyData, store: Store, classify: ClassifySpec
) -> None:
    specs = [pretrain(data), pretrain(data, causal=True), pretrain(data, seed=1), classify,
             dataclasses.replace(classify, each=("plain", "plain")), dataclasses.replace(classify, each=("plain",))]
    assert len({run_key(spec) for spec in specs}) == len(specs)
    first = [train_or_load(spec, store, data).history()["loss"].iloc[0] for spec in specs[3:]]
    assert len(set(first)) == 1  # the first step is the usual one on the same batch


def test_specs_that_cannot_be(data: StudyData, store: Store, classify: ClassifySpec) -> None:
    for changes, sentence in [({"each": ("plain",) * 3}, "one step or two"), ({"each": ("salt",)}, "no cure"),
                              ({"batches": 0}, "a batch or more"), ({"origin": "x"}, "starts from")]:
        with pytest.raises(MomeError, match=sentence):
            dataclasses.replace(classify, **changes)
    with pytest.raises(MomeError, match="share of masked"):
        pretrain(data, masked=1.0)
    with pytest.raises(MissingArtifact):
        train_or_load(dataclasses.replace(classify, start="nothing"), store, data)
    with pytest.raises(MomeError, match="fewer than a batch"):
        train_or_load(dataclasses.replace(classify, batch_size=1000), store, data)


def test_annotated_files_become_a_task(data: StudyData, tmp_path: Path) -> None:
    text = "".join(f"{w} {t}\n" for w, t in [("EU", "I-ORG"), ("rejects", "O"), ("", ""), ("Rome", "I-LOC")])
    for name in ("eng.train", "eng.testb"):
        (tmp_path / name).write_text(text.replace(" \n", "\n"), encoding="utf-8")
    task = task_from_folder(tmp_path, data, 15)
    assert task.spans and task.labels == ("B-LOC", "B-ORG", "O") and len(task.train) == len(task.test) == 2
    (tmp_path / "eng.testb").write_text(text.replace(" \n", "\n") + "x I-NEW\n", encoding="utf-8")
    with pytest.raises(MomeError, match="in the test file"):
        task_from_folder(tmp_path, data, 15)


# --- scores


@pytest.mark.parametrize(("true", "predicted", "expected"), [
    ([1, 2, 0, 1], [1, 2, 0, 1], (2, 0, 0)),
    ([1, 2, 0, 1], [1, 0, 0, 1], (1, 1, 1)),
    ([0, 0], [1, 2], (0, 1, 0)),
    ([1, 1], [1, 2], (0, 1, 2)),
    ([3, 0], [1, 0], (0, 1, 1)),
])
def test_spans_match_exactly_or_not_at_all(true: list[int], predicted: list[int], expected: tuple) -> None:
    task = Task("t", ("O", "B-X", "I-X", "B-Y"), True, (), ())
    assert count_matches(task, true, predicted) == {SPAN: expected}


def test_labels_are_counted_one_by_one() -> None:
    task = Task("t", ("a", "b", "c"), False, (), ())
    assert count_matches(task, [0, 0, 1, 2], [0, 1, 1, 0]) == {"a": (1, 1, 1), "b": (1, 1, 0), "c": (0, 0, 1)}


def test_places_are_scored_as_one_sentence_at_a_time_by_hand(
    data: StudyData, store: Store, classify: ClassifySpec, task_key: str
) -> None:
    model, task = load_classifier(train_or_load(classify, store, data).folder), load_task(store, task_key)
    bos, pad = data.tokenizer.bos_token_id, data.tokenizer.pad_token_id
    counts, losses = score_places(model, task, 4, bos=bos, pad=pad, max_positions=64, batch_size=5)
    looks = attention_to_copies(model, task, 4, bos=bos, pad=pad, batch_size=5)
    expected: dict[tuple, int] = {}
    nats = {"copies": np.zeros(64), "shift": np.zeros(64)}
    shares, words = np.zeros((4, 5)), 0
    with torch.no_grad():
        for s in task.test:
            n = len(s)
            out = model(torch.tensor([[bos, *s.ids * 4]]), output_attentions=True)
            weights = torch.stack(out.attentions).mean((0, 1, 2)).numpy()
            words += n
            for k in range(4):
                begin = 1 + k * n
                # By hand: the sentence moved behind padding that nobody sees.
                moved = torch.tensor([[bos, *[pad] * (k * n), *s.ids]])
                mask = torch.tensor([[1, *[0] * (k * n), *[1] * n]])
                single = model(moved, attention_mask=mask).logits[0, begin:]
                rows = weights[begin : begin + n].sum(0)
                shares[k] += [rows[0], *rows[1:].reshape(4, n).sum(1)]
                for measure, logits in (("copies", out.logits[0, begin : begin + n]), ("shift", single)):
                    for i, label in enumerate(s.labels):
                        if label != IGNORED:
                            hit = int(logits[i].argmax()) == label
                            name = (measure, k + 1, task.labels[label], "tp" if hit else "fn")
                            expected[name] = expected.get(name, 0) + 1
                            nats[measure][begin + i] -= float(logits[i].log_softmax(-1)[label])
    sums = counts.groupby(["measure", "k", "label"])[["tp", "fp", "fn"]].sum()
    assert len(expected) > 20
    for (measure, k, label, what), value in expected.items():
        assert sums.loc[(measure, k, label), what] == value
    assert (counts.groupby(["measure", "k"])[["tp", "fn"]].sum().sum(1).nunique()) == 1
    for measure in nats:
        own = losses[losses["measure"] == measure].set_index("position")["nats"]
        assert np.allclose(own, nats[measure][own.index], rtol=1e-4)
    table = looks.pivot(index="k", columns="target", values="share").to_numpy()
    assert np.allclose(table, shares / words, atol=1e-5) and np.allclose(table.sum(1), 1)
    made = score_job(train_or_load(classify, store, data).key, task_key, 4, 1, store.root, data.path)
    pd.testing.assert_frame_equal(made[0], counts)
    with pytest.raises(MomeError, match="do not fit into 64"):
        score_places(model, task, 9, bos=bos, pad=pad, max_positions=64)


# --- tables


def table_of(f1: dict[tuple[int, str, int], tuple[int, int, int]]) -> pd.DataFrame:
    """(seed, arm, k) → counts of the one label, spread over two documents."""
    rows = []
    for (seed, arm, k), counts in f1.items():
        for document, share in (("x", 0.5), ("y", 0.5)):
            tp, fp, fn = (int(share * c) for c in counts)
            rows.append(("t", "m", arm, seed, "copies", k, document, "a", tp, fp, fn))
    columns = ["task", "model", "arm", "seed", "measure", "k", "document", "label", "tp", "fp", "fn"]
    return pd.DataFrame(rows, columns=columns)


def test_f1_its_drop_and_what_is_won_back() -> None:
    rows = table_of({
        (0, "twice", 1): (8, 2, 2), (0, "twice", 2): (4, 6, 6), (0, "cp", 1): (8, 2, 2), (0, "cp", 2): (6, 4, 4),
        (1, "twice", 1): (8, 2, 2), (1, "twice", 2): (6, 4, 4), (1, "cp", 1): (8, 2, 2), (1, "cp", 2): (6, 4, 4),
    })
    twice = rows[rows["arm"] == "twice"]
    assert position_tables.f1_interval(twice[twice["k"] == 1]).estimate == pytest.approx(80)
    drop = position_tables.drop_interval(twice)
    assert drop.estimate == pytest.approx((40 + 20) / 2) and (drop.seeds, drop.documents) == (2, 2)
    gain = position_tables.gain_interval(rows, ["cp"], "twice", 2)
    assert gain.estimate == pytest.approx((20 + 0) / 2) and gain.low < 0 < gain.high
    table = position_tables.drop_table(rows).set_index("arm")
    assert table.loc["cp", "estimate"] == pytest.approx(20) and table.loc["cp", "first"] == pytest.approx(80)
    assert len(position_tables.f1_table(rows)) == 4
    with pytest.raises(IntervalError, match="share no seed"):
        position_tables.difference_interval(twice[twice["seed"] == 0], twice[twice["seed"] == 1])
    with pytest.raises(IntervalError, match="score both alike"):
        position_tables.difference_interval(twice, twice.assign(model="other"))


def test_labels_that_are_only_said_are_no_part_of_the_mean() -> None:
    rows = table_of({(0, "plain", 1): (8, 2, 2)})
    said = rows.assign(label="b", tp=0, fp=4, fn=0)
    assert position_tables.f1_interval(pd.concat([rows, said])).estimate == pytest.approx(80)
    missed = rows.assign(label="b", tp=0, fp=0, fn=4)
    assert position_tables.f1_interval(pd.concat([rows, missed])).estimate == pytest.approx(40)


def test_several_cures_are_averaged_against_the_same_control() -> None:
    rows = table_of({(0, "twice", 2): (4, 6, 6), (0, "cp", 2): (6, 4, 4), (0, "rps", 2): (8, 2, 2)})
    assert position_tables.gain_interval(rows, ["cp", "rps"], "twice", 2).estimate == pytest.approx(30)


def test_arms_of_the_recipes_are_what_their_names_say() -> None:
    assert position_recipes.ARMS["twice"] == ("plain", "plain")
    assert all(position_recipes.ARMS[cure] == ("plain", cure) for cure in position_recipes.CURED)


def test_the_figure_of_positions() -> None:
    seen = pd.DataFrame({"position": [1, 2, 3], "count": [5, 3, 1]})
    losses = pd.DataFrame({"position": range(8), "nats": np.arange(8.0), "words": 2, "kind": "absolute encoder"})
    left, right = figures_position.position_profile(seen, losses, bins=2).axes
    assert [bar.get_height() for bar in left.patches] == [5, 3, 1]
    assert right.lines[0].get_ydata() == pytest.approx([0.25, 1.25, 2.25, 3.25])
    with pytest.raises(FigureError, match="lacks kind"):
        figures_position.position_profile(seen, losses.drop(columns="kind"))
