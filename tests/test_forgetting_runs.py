"""Scores of finished runs: stages, untrained models, classes, JEET that grows; on tiny runs trained for real."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils import recipes, recipes_continual
from mome_utils.config import MomeError
from mome_utils.evaluation import score_documents
from mome_utils.forgetting import forgetting, r_matrix
from mome_utils.forgetting_growth import grow_routers, score_growing
from mome_utils.forgetting_runs import (
    changes_inside,
    class_rows,
    growing_rows,
    mixture_rows,
    stage_rows,
    untrained_rows,
)
from mome_utils.moe import MomeForCausalLM
from mome_utils.router_fit import fit_router
from mome_utils.study import Study
from mome_utils.training import build_model

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "expert": [1, 16, 2], "teacher_epochs": 0.1, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4,
    "evaluations": 2, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        study.build_data()
        train = {g: study.data().block_array("train", g) for g in study.languages}
        study.save_router(fit_router(train, study.data().vocab_size))
        yield study


@pytest.fixture(scope="module")
def runs(study):
    return study.runs([recipes.sequential_spec(study, 0)])


@pytest.fixture(scope="module")
def rows(study, runs):
    return stage_rows(study, {"sequential": runs})


def test_every_stage_is_the_score_of_its_snapshot(study, runs, rows):
    assert set(rows["stage"]) == {1, 2} and set(rows["arm"]) == {"sequential"}
    for stage, end in enumerate(runs[0].spec.snapshots, start=1):
        expected = study.score(runs, step=end)
        assert rows[rows["stage"] == stage]["nats"].to_list() == expected["nats"].to_list()
    assert r_matrix(rows, study.languages).shape == (2, 2)


def test_untrained_scores_are_of_the_runs_own_start(study, runs, rows):
    found = untrained_rows(study, runs)
    model = build_model(runs[0].spec.model, 0).eval()
    documents = study.data().documents("test", "py")
    expected = score_documents(lambda ids: model(input_ids=ids, use_cache=False).logits, study.data().tokenizer,
                               documents, block_size=32, stride=16)
    np.testing.assert_allclose(found[found["language"] == "py"]["nats"], expected["nats"], rtol=1e-6)
    assert found["nats"].sum() > rows[rows["stage"] == 2]["nats"].sum()


def test_classes_add_up_to_the_stages_scores(study, runs, rows):
    found = class_rows(study, runs, "py")
    sums = found.groupby(["stage", "document"])["nats"].sum()
    expected = rows[rows["language"] == "py"].set_index(["stage", "document"])["nats"]
    pd.testing.assert_series_equal(sums.sort_index(), expected.sort_index(), rtol=1e-6)


def test_changes_inside_compare_with_the_first_stage(study, runs):
    ids = torch.from_numpy(study.data().block_array("validation", "en")[:3].astype(np.int64))
    drift, layers = changes_inside(runs, ids)
    assert set(drift["stage"]) == {"py"} == set(layers["stage"])
    assert (drift["drift"] > 0).all() and layers["similarity"].between(-1, 1).all()


def test_jeet_forgets_nothing_when_frozen_and_something_when_not(study):
    """Bitwise, under true routes: from its own stage on no document of a language has another loss."""
    train = {g: study.data().block_array("train", g) for g in study.languages}
    routers = grow_routers(train, study.data().vocab_size)
    change, lost = {}, {}
    for frozen in (True, False):
        grown = study.runs([recipes_continual.growing_spec(study, 0, frozen=frozen)])
        scored = growing_rows(study, grown, routers)
        oracle = scored[scored["routes"] == "oracle"]
        nats = oracle[oracle["language"] == "en"].pivot(index="document", columns="stage", values="nats")
        change[frozen] = (nats[2] - nats[1]).abs().max()
        lost[frozen] = float(forgetting(r_matrix(oracle, study.languages)))
    assert change[True] == 0 and lost[True] == 0
    assert change[False] > 0 and lost[False] != 0
    with pytest.raises(MomeError, match="growing_spec"):
        growing_rows(study, study.runs([recipes.sequential_spec(study, 0)]), routers)


def test_a_growing_mixture_is_scored_as_by_hand(study):
    specs = [recipes.student_spec(study, g, "ce", 0) for g in study.languages]
    experts = dict(zip(study.languages, study.runs(specs), strict=True))
    data = study.data()
    routers = grow_routers({g: data.block_array("train", g) for g in study.languages}, data.vocab_size)
    found = mixture_rows(study, [experts], routers)
    model = MomeForCausalLM.from_experts({g: run.model() for g, run in experts.items()}, study.router()).eval()
    documents = [d for g in study.languages for d in data.documents("test", g)]
    expected = score_growing(model, data.tokenizer, documents, block_size=32, stride=16, routers=routers)
    pd.testing.assert_frame_equal(found.drop(columns="seed"), expected)
    assert set(found["seed"]) == {0}
