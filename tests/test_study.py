"""What a notebook opens: parameters checked before any work, results found, shown and kept."""

import json
from dataclasses import replace

import joblib
import pandas as pd
import pytest

from mome_utils.artifacts import DamagedArtifact, MissingArtifact
from mome_utils.config import MomeError
from mome_utils.display import markdown_table
from mome_utils.figures import token_bars
from mome_utils.intervals import Interval
from mome_utils.places import study_folder
from mome_utils.study import Study
from mome_utils.sweeps import in_parallel


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A local corpus of two languages, and a store of its own."""
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    for language, word in (("en", "word"), ("fr", "mot")):
        folder = tmp_path / "texts" / language
        folder.mkdir(parents=True)
        for topic in range(12):
            text = "\n\n".join(f"{word} {topic} {part} " * 12 for part in range(4))
            (folder / f"t{topic:02d}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


def opened(corpus, **changes):
    overrides = {"vocab_size": 300, "block_size": 32, "stride": 16, "topics": None, "test_fraction": 0.2,
                 "validation_fraction": 0.2}
    return Study.open("test", profile="smoke", corpus=str(corpus), overrides=overrides | changes, quiet=True)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"profile": "huge"}, "no profile 'huge'"),
        ({"seeds": -1}, "seeds must be 0"),
        ({"corpus": "nowhere/at/all"}, "does not exist"),
        ({"languages": ["en"]}, "at least 2 languages"),
        ({"languages": ["en", "tlh"]}, "no language 'tlh'"),
        ({"overrides": {"width": 3}}, "no field 'width'"),
    ],
)
def test_bad_parameters_get_one_sentence_before_anything_is_written(tmp_path, monkeypatch, parameters, message):
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    with pytest.raises(MomeError, match=message) as error:
        Study.open("test", **({"profile": "smoke"} | parameters), quiet=True)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_seeds_and_languages_follow_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    study = Study.open("test", profile="smoke", languages=["py", "en"], seeds=2, quiet=True)
    assert study.languages == ("py", "en") and study.seeds == (0, 1)


def test_a_user_corpus_lies_beside_the_embedded_one(small):
    assert study_folder("smoke") != study_folder("smoke", str(small))
    assert study_folder("smoke", str(small)).parent == study_folder("smoke").parent


def test_upstream_that_is_missing_is_named(small):
    study = opened(small)
    with pytest.raises(MissingArtifact, match=r"run notebooks/01_dataset_creation\.ipynb first"):
        study.data()
    study.build_data()
    with pytest.raises(MissingArtifact, match=r"run notebooks/04_router_bakeoff\.ipynb first"):
        study.router()


def test_data_that_cannot_be_balanced_leaves_nothing_behind(small):
    # Texts of one paragraph cannot be cut, and every French one is longer than its English twin.
    for language, words in (("en", 40), ("fr", 90)):
        for file in (small / language).iterdir():
            file.write_text("phrase " * words, encoding="utf-8")
    study = opened(small, max_diff_percent=5)
    with pytest.raises(MomeError, match="max_diff_percent"):
        study.build_data()
    assert not list((study.store.root / "dataset").glob("*/manifest.json"))


def test_a_damaged_data_set_is_seen_and_made_again(small):
    study = opened(small)
    fingerprint = study.build_data().fingerprint
    (study.data().path / "documents.parquet").write_bytes(b"damaged")
    with pytest.raises(DamagedArtifact, match="documents.parquet"):
        opened(small).data()
    assert opened(small).build_data().fingerprint == fingerprint


def test_cached_rows_are_computed_once_per_input(small):
    study = opened(small)
    study.build_data()
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"value": [len(calls)]})

    assert study.cached_rows("t", {"a": 1}, compute)["value"].tolist() == [1]
    assert study.cached_rows("t", {"a": 1}, compute)["value"].tolist() == [1]
    assert study.cached_rows("t", {"a": 2}, compute)["value"].tolist() == [2]


def test_a_table_of_scores_belongs_to_its_inputs_and_code_and_is_touched_when_read(small):
    study = opened(small)
    study.build_data()
    scores, table = study.scores, pd.DataFrame({"nats": [1.5, 2.5]})
    key = scores.key("documents", {"run": "r"})
    assert key == opened(small).scores.key("documents", {"run": "r"})
    others = {scores.key("other", {"run": "r"}), scores.key("documents", {"run": "s"}),
              scores.key("documents", {"run": "r"}, ["mome_utils.models"]),
              replace(scores, data="other").key("documents", {"run": "r"}),
              replace(scores, stride=scores.stride + 1).key("documents", {"run": "r"})}
    assert len(others) == 5 and key not in others and not scores.has(key)
    scores.save(key, table, {"run": "r"})
    assert scores.has(key) and f"scores/{key}/manifest.json" not in study.touched
    pd.testing.assert_frame_equal(scores.read(key), table)
    assert f"scores/{key}/manifest.json" in study.touched
    (study.store.path("scores", key) / "rows.parquet").write_bytes(b"damaged")
    with pytest.raises(DamagedArtifact, match="rows.parquet"):
        scores.has(key)


def _squares(number, seen):
    with seen.open("a", encoding="utf-8") as log:
        log.write(f"{number}\n")
    return pd.DataFrame({"square": [number**2]})


def test_of_several_tables_only_missing_ones_are_computed_and_all_come_in_order(small, tmp_path):
    study, seen = opened(small, jobs=2), tmp_path / "seen"
    study.build_data()

    def tables(*numbers):
        found = study.cached_tables("squares", [({"of": n}, (n, seen)) for n in numbers], _squares)
        return [int(table["square"][0]) for table in found]

    assert tables(3, 2) == [9, 4]
    assert tables(2, 5, 3, 5) == [4, 25, 9, 25]
    assert sorted(seen.read_text(encoding="utf-8").split()) == ["2", "3", "5"]
    study.profile = replace(study.profile, jobs=1)  # one after the other: side by side, the error may come first
    with pytest.raises(TypeError):
        tables(7, None)
    assert study.scores.has(study.scores.key("squares", {"of": 7}))  # what was done before the error is kept


def test_a_cached_table_may_run_jobs_of_its_own_wherever_they_go(small):
    study = opened(small)
    study.build_data()
    with joblib.parallel_config("threading", n_jobs=2):
        found = study.cached_rows("t", {}, lambda: pd.DataFrame({"x": in_parallel(abs, [(-1,), (2,)], workers=2)}))
    assert found["x"].tolist() == [1, 2]


def test_finish_keeps_tables_claims_and_what_was_touched(small, capsys):
    study = opened(small)
    study.build_data()
    study.save(pd.DataFrame({"x": [1, 2]}), "numbers")
    study.settle({"C6": Interval(0.5, 0.4, 0.6, 3, 40)})
    bars = pd.DataFrame({"language": ["en", "fr"], "split": ["train"] * 2, "tokens": [10, 11]})
    study.show(token_bars(bars), "bars", caption="c", alt="a")
    study.finish()
    folder = study.store.load("results", "test")
    assert pd.read_parquet(folder / "numbers.parquet")["x"].tolist() == [1, 2]
    claims = pd.read_parquet(folder / "claims.parquet").set_index("claim")
    assert claims.loc["C6", "verdict"] == "reproduced"
    assert (study.store.root / "figures" / "test" / "bars.svg").read_text(encoding="utf-8").startswith("<?xml")
    touched = json.loads((study.store.root / "notebooks" / "test.touched.json").read_text(encoding="utf-8"))
    assert f"dataset/{study.dataset_key()}/manifest.json" in touched["manifests"]
    assert "results/test/manifest.json" in touched["manifests"]


def test_time_of_extended_arms_is_reported_apart_whether_trained_now_or_before(small):
    study = opened(small)
    seconds = {"core, now": 100, "core, before": 200, "extra, now": 400, "extra, before": 800, "both": 1600}
    folders = {}
    for name, taken in seconds.items():
        with study.store.create("runs", name.replace(", ", "-"), inputs={}, parameters={}, modules=[]) as result:
            result.metrics.update(seconds=taken * study.profile.jobs)
        folders[name] = study.store.path("runs", name.replace(", ", "-"))
        trained, extra = name.endswith("now"), name.startswith("extra")
        study.count_run(folders[name], {"seconds": taken * study.profile.jobs}, trained=trained, extra=extra)
    study.count_run(folders["both"], {"seconds": 1600 * study.profile.jobs}, trained=False, extra=True)
    study.finish()
    path = study.store.root / "notebooks" / f"{study.notebook}.touched.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    # The notebook's own time holds 100 and 400: what it would take without extended arms adds 200 and 1600, less 400.
    assert record["run_seconds"] == 200 + 1600 - 400 and record["extra_seconds"] == 400 + 800
    assert record["extended"] == ["runs/extra-before/manifest.json", "runs/extra-now/manifest.json"]


def test_markdown_tables_align_numbers_and_escape_bars():
    table = markdown_table(pd.DataFrame({"name": ["a|b", "<s>", "`<s>`"], "n": ["1.0", "2.0", "3.0"]}))
    assert table.splitlines() == [
        "| name | n |", "| --- | ---: |", "| a\\|b | 1.0 |", "| \\<s> | 2.0 |", "| `<s>` | 3.0 |",
    ]
