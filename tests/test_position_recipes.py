"""What notebook 08 trains and scores through a study: sizes, seeds, and that everything is made once."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mome_utils import position_recipes as plans
from mome_utils.config import MomeError
from mome_utils.position_runs import STAGE, PositionRun
from mome_utils.position_tasks import task_specs
from mome_utils.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        found = Study.open(
            "08_position_bias", profile="smoke", languages=["fr", "py"], overrides={"topics": 30}, quiet=True
        )
        found.build_data()
        return found


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_sizes_and_seeds_follow_the_profile(study: Study) -> None:
    assert plans.seeds_of(study) == (0,) and plans.seeds_of(study, 3) == (0, 1, 2)
    spec = plans.pretrain_spec(study, "rotary", "decoder", 4)
    assert (spec.position, spec.causal, spec.seed, spec.shape) == ("rotary", True, 4, plans.budget_of(study).shape)
    assert spec.languages == ("fr", "py")
    assert spec.batch_size % 2 == 0 and spec.batch_size >= plans.budget_of(study).blocks
    assert plans.pretrain_spec(study, "rotary", "encoder", 4).causal is False


def test_runs_and_scores_are_made_once(study: Study) -> None:
    tasks = plans.tasks_of(study, 4)
    assert list(tasks) == [spec.kind for spec in task_specs(["fr", "py"], 64, 4, 1, 1)] == ["code", "entities"]
    start = plans.pretrain_spec(study, "absolute", "encoder", 0)
    plans.position_runs(study, [start])
    specs = [plans.classify_spec(study, tasks["code"], start, arm) for arm in ("plain", "cp")]
    assert [spec.each for spec in specs] == [("plain",), ("plain", "cp")]
    assert plans.classify_spec(study, tasks["code"], start, "plain", longer=2).batches == 2 * specs[0].batches
    plain, cured = plans.position_runs(study, specs)
    runs: dict[tuple[str, str, str], list[PositionRun]] = {
        ("code", "absolute encoder", "plain"): [plain], ("code", "absolute encoder", "cp"): [cured]}
    scores, made = plans.score_runs(study, runs, 4), files(study.store.root)
    assert set(scores.counts["arm"]) == {"plain", "cp"} and set(scores.counts["measure"]) == {"copies", "shift"}
    assert set(scores.counts["k"]) == {1, 2, 3, 4} and set(scores.counts["seed"]) == {0}
    again = plans.score_runs(study, runs, 4)
    assert [run.key for run in plans.position_runs(study, specs)] == [plain.key, cured.key]
    for one, other in zip(scores, again, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert files(study.store.root) == made and plans.tasks_of(study, 4) == tasks
    touched = {name.split("/")[0] for name in study.touched}
    assert touched >= {STAGE, "position_tasks", "scores"}
    assert all(seconds == 0 for seconds in study.loaded.values())  # trained here, in the notebook's own time


def test_what_cannot_be_asked_for(study: Study) -> None:
    for copies in (1, 9):
        with pytest.raises(MomeError, match="copies must lie between 2 and 8"):
            plans.tasks_of(study, copies)
    with pytest.raises(MomeError, match="no arm 'salt'"):
        plans.classify_spec(study, "task", plans.pretrain_spec(study, "absolute", "encoder", 0), "salt")
