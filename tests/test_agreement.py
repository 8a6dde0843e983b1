"""Agreement of student and teacher: every number against an independent computation, tables, and the store."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils import agreement, recipes
from mome_utils.agreement import BINS, Agreement, agreement_rows, compare_documents
from mome_utils.agreement_tables import MEASURES, agreement_interval, agreement_table, reliability
from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import (
    IntervalError,
    encode_documents,
    paired_interval,
    position_logits,
    score_documents,
    windows,
)
from mome_utils.models import build_gpt2
from mome_utils.runs import Run, run_key
from mome_utils.study import Study
from mome_utils.tokenization import train_tokenizer
from mome_utils.training import build_model, save_model

torch.set_num_threads(1)
BLOCK, STRIDE = 16, 6
TEXTS = {"long": "Überall wächst Gras, naïve café, and a plain sentence. " * 4, "short": "Ein Bär.", "empty": ""}


def document(name: str, language: str, text: str) -> Document:
    return Document(id=name, language=language, group="g", title=name, text=text)


DOCUMENTS = [document(name, "en" if i % 2 else "de", text) for i, (name, text) in enumerate(TEXTS.items())]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS.values(), "more words to merge, more words"] * 3, 300)


def model_of(tokenizer, seed: int, width: int = 16):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    made = build_gpt2(
        Shape(2, width, 2), vocab_size=len(tokenizer), block_size=BLOCK, seed=seed, bos=bos, eos=eos
    ).eval()
    with torch.no_grad():
        made.transformer.wte.weight.mul_(3)  # surer of itself, so that more bins are in use
    return made


@pytest.fixture(scope="module")
def models(tokenizer):
    return {"teacher": model_of(tokenizer, 0, 32), "a": model_of(tokenizer, 1), "b": model_of(tokenizer, 2)}


def compare(models, tokenizer, names=("a", "b"), **options) -> Agreement:
    return compare_documents(
        {name: position_logits(models[name]) for name in names}, position_logits(models["teacher"]), tokenizer,
        DOCUMENTS, block_size=BLOCK, stride=STRIDE, **options,
    )


@pytest.fixture(scope="module")
def rows(models, tokenizer) -> Agreement:
    return compare(models, tokenizer)


def alone(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [tokens, V] in float64 and targets of one document, window by window and by itself."""
    found, targets = [], []
    for start, end, first in windows(ids, BLOCK, STRIDE):
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:end]])).logits[0].double()
        found += [logits[t - start - 1].softmax(-1).numpy() for t in range(first, end)]
        targets += ids[first:end]
    return np.array(found).reshape(len(targets), model.config.vocab_size), np.array(targets, dtype=int)


# --- counting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_sum_is_that_of_each_document_by_itself(models, tokenizer, rows, name) -> None:
    mine = rows.documents[rows.documents["student"] == name].set_index("document")
    bins = rows.bins[rows.bins["student"] == name].set_index(["document", "relation", "bin"])
    for doc, ids in zip(DOCUMENTS, encode_documents(tokenizer, DOCUMENTS), strict=True):
        p, y = alone(models["teacher"], ids)
        q, _ = alone(models[name], ids)
        row, at = mine.loc[doc.id], np.arange(len(y))
        assert (row["tokens"], row["bytes"]) == (len(ids) - 1, len(doc.text.encode()))
        p_best, q_best = (x.argmax(1) if len(y) else y for x in (p, q))
        expected = {
            "same_top": (p_best == q_best).sum(), "overlap": np.minimum(p, q).sum(),
            "forward_kl": (p * np.log(p / q)).sum(), "reverse_kl": (q * np.log(q / p)).sum(),
            "student_nats": -np.log(q[at, y]).sum(), "teacher_nats": -np.log(p[at, y]).sum(),
            "student_entropy": -(q * np.log(q)).sum(), "teacher_entropy": -(p * np.log(p)).sum(),
            "student_hits": (q_best == y).sum(), "teacher_hits": (p_best == y).sum(),
        }
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-4), column
        relations = {
            "student_data": (q[at, q_best], q_best == y), "teacher_data": (p[at, p_best], p_best == y),
            "student_teacher": (q[at, q_best], p[at, q_best]),
        }
        for relation, (confidence, accuracy) in relations.items():
            for b in range(BINS):
                inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
                cell = bins.loc[(doc.id, relation, b)]
                assert cell["positions"] == inside.sum()
                assert cell["confidence"] == pytest.approx(confidence[inside].sum(), rel=1e-5)
                assert cell["accuracy"] == pytest.approx(accuracy[inside].sum(), rel=1e-5)
    assert bins.reset_index().query("positions > 0")["bin"].nunique() > 3  # the test looks at more than one bin


def test_losses_are_those_of_the_scores_and_batches_change_nothing(models, tokenizer, rows) -> None:
    scores = score_documents(
        lambda ids: models["a"](input_ids=ids).logits, tokenizer, DOCUMENTS, block_size=BLOCK, stride=STRIDE
    )
    mine = rows.documents[rows.documents["student"] == "a"].reset_index(drop=True)
    np.testing.assert_allclose(mine["student_nats"], scores["nats"], rtol=1e-5)
    assert (mine["tokens"] == scores["tokens"]).all() and (mine["bytes"] == scores["bytes"]).all()
    small = compare(models, tokenizer, batch_size=1)
    numbers = rows.documents.select_dtypes("number").columns
    np.testing.assert_allclose(small.documents[numbers], rows.documents[numbers], rtol=1e-4, atol=1e-4)
    one = compare(models, tokenizer, names=("b",))
    pd.testing.assert_frame_equal(
        one.bins, rows.bins[rows.bins["student"] == "b"].reset_index(drop=True), check_exact=False
    )


def test_a_model_agrees_with_itself(models, tokenizer) -> None:
    own = compare(models, tokenizer, names=("teacher",)).documents
    for column in ("same_top", "overlap"):
        np.testing.assert_allclose(own[column], own["tokens"], rtol=1e-5)
    np.testing.assert_allclose(own[["forward_kl", "reverse_kl"]], 0, atol=1e-5)
    assert agreement_interval(compare(models, tokenizer, names=("teacher",)), "ece_teacher").estimate < 1e-6


def test_calibration_by_hand(tokenizer) -> None:
    """A student that gives its token 0.8 where the teacher gives it 0.5, and that is never right."""
    size, favourite = len(tokenizer), 7

    def sure(share: float):
        rest = np.log((1 - share) / (size - 1))
        row = torch.full((size,), float(rest))
        row[favourite] = np.log(share)
        return lambda batch: row.expand(len(batch.targets), -1)

    texts = [document("x", "en", "plain words and a plain sentence " * 3)]
    made = compare_documents({"s": sure(0.8)}, sure(0.5), tokenizer, texts, block_size=BLOCK, stride=STRIDE)
    assert favourite not in encode_documents(tokenizer, texts)[0]
    assert agreement_interval(made, "ece").estimate == pytest.approx(0.8, abs=1e-6)
    assert agreement_interval(made, "ece_teacher").estimate == pytest.approx(0.3, abs=1e-6)
    assert agreement_interval(made, "overconfidence_teacher").estimate == pytest.approx(0.3, abs=1e-6)
    assert agreement_interval(made, "teacher_ece").estimate == pytest.approx(0.5, abs=1e-6)
    assert agreement_interval(made, "same_top").estimate == 1 and agreement_interval(made, "accuracy").estimate == 0
    bins = reliability(made, by=["student"]).query("positions > 0").set_index("relation")
    assert bins["bin"].to_dict() == {"student_data": 11, "teacher_data": 7, "student_teacher": 11}
    assert bins.loc["student_teacher", ["confidence", "accuracy", "share"]].tolist() == pytest.approx([0.8, 0.5, 1.0])


def test_tokens_that_a_side_rules_out(tokenizer) -> None:
    def without(token: int, seed: int):
        row = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(seed))
        row[token] = -torch.inf
        return lambda batch: row.expand(len(batch.targets), -1)

    texts = [document("x", "en", "plain")]
    options = {"block_size": BLOCK, "stride": STRIDE}
    both = compare_documents({"s": without(3, 0)}, without(3, 1), tokenizer, texts, **options).documents
    assert np.isfinite(both.select_dtypes("number")).all(axis=None)
    only = compare_documents({"s": without(3, 0)}, without(4, 1), tokenizer, texts, **options).documents
    assert np.isinf(only[["forward_kl", "reverse_kl"]]).all(axis=None) and np.isfinite(only["overlap"]).all()


def test_comparing_nothing_is_refused(tokenizer, models) -> None:
    with pytest.raises(MomeError, match="no student"):
        compare(models, tokenizer, names=())


# --- tables -----------------------------------------------------------------------------------------------------


def made_up(arms=("fixed", "ce"), seeds=3, documents=12, shift=0.0) -> Agreement:
    """Rows as the store gives them, of numbers with spread between seeds, documents and languages."""
    rng = np.random.default_rng(0)
    held, bins = [], []
    for arm in arms:
        for seed in range(seeds):
            for language in ("en", "fr"):
                for name in map(str, range(documents)):
                    tokens = int(rng.integers(80, 120))
                    sums = {column: tokens * rng.uniform(0.2, 0.4) for column in agreement.SUMS}
                    held.append({"arm": arm, "seed": seed, "language": language, "document": name, "tokens": tokens,
                                 "bytes": 4 * tokens} | sums)
                    for relation in agreement.RELATIONS:
                        counts = rng.multinomial(tokens, np.ones(BINS) / BINS)
                        middle = (np.arange(BINS) + 0.5) / BINS
                        for b in range(BINS):
                            off = (0, rng.normal(shift, 0.1))
                            sure, right = (counts[b] * np.clip(middle[b] + x, 0, 1) for x in off)
                            bins.append((arm, seed, language, name, relation, b, counts[b], sure, right))
    names = ["arm", "seed", "language", "document", "relation", "bin", "positions", "confidence", "accuracy"]
    return Agreement(pd.DataFrame(held), pd.DataFrame(bins, columns=names))


@pytest.fixture(scope="module")
def table() -> Agreement:
    return made_up()


def test_shares_and_divergences_have_the_intervals_of_losses(table) -> None:
    """A measure is a loss under another name, so its difference is that of paired_interval."""
    named = table.documents.assign(nats=table.documents["forward_kl"])
    a, b = (named[named["arm"] == arm] for arm in ("ce", "fixed"))
    expected = paired_interval(a, b, measure="nats_per_token")
    found = agreement_table(table, ["forward_kl"], versus="fixed").iloc[0]
    assert found["arm"] == "ce"
    assert [found[k] for k in ("estimate", "low", "high", "seeds", "documents")] == pytest.approx(
        list(vars(expected).values())
    )
    per_byte = agreement_table(table, ["forward_kl_per_byte"]).set_index("arm")["estimate"]
    np.testing.assert_allclose(per_byte, agreement_table(table, ["forward_kl"]).set_index("arm")["estimate"] / 4)


def test_a_calibration_error_is_put_together_per_seed_and_language(table) -> None:
    mine = table.bins.query("arm == 'ce' and relation == 'student_teacher'")
    gaps = mine.assign(gap=mine["confidence"] - mine["accuracy"]).groupby(["seed", "language", "bin"])
    sums = gaps[["gap", "positions"]].sum()
    whole = sums["positions"].groupby(["seed", "language"]).sum()
    expected = (sums["gap"].abs().groupby(["seed", "language"]).sum() / whole).mean()
    signed = (sums["gap"].groupby(["seed", "language"]).sum() / whole).mean()
    found = agreement_table(table, ["ece_teacher", "overconfidence_teacher"]).query("arm == 'ce'")
    assert found["estimate"].tolist() == pytest.approx([expected, signed])
    assert (found["low"] < found["estimate"]).all() and (found["estimate"] < found["high"]).all()
    assert found["text"].iloc[0].startswith(f"{100 * expected:.2f} [")


@pytest.mark.parametrize("measure", ["ece", "same_top", "overconfidence"])
def test_a_difference_is_one_of_estimates_and_changes_its_sign(table, measure) -> None:
    single = agreement_table(table, [measure]).set_index("arm")["estimate"]
    against, back = (agreement_table(table, [measure], versus=arm).iloc[0] for arm in ("fixed", "ce"))
    assert against["estimate"] == pytest.approx(single["ce"] - single["fixed"])
    assert back["estimate"] == pytest.approx(-against["estimate"]) and back["high"] == pytest.approx(-against["low"])
    assert against["text"][0] in "+-"


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_an_arm_never_differs_from_itself(seed: int, seeds: int) -> None:
    part = made_up(("fixed",), seeds, documents=3, shift=seed % 7 / 50)
    twin = part.assign(arm="twin")
    found = agreement_table(Agreement.concat([part, twin]), ["ece", "reverse_kl"], versus="fixed")
    np.testing.assert_allclose(found[["estimate", "low", "high"]], 0, atol=1e-12)


def test_tables_refuse_what_they_cannot_compare(table) -> None:
    with pytest.raises(MomeError, match="Unknown measure 'bleu'"):
        agreement_table(table, ["bleu"])
    with pytest.raises(MomeError, match="Nothing can be compared with 'kd'"):
        agreement_table(table, versus="kd")
    fixed, ce = (Agreement(*(rows[rows["arm"] == arm] for rows in vars(table).values())) for arm in ("fixed", "ce"))
    with pytest.raises(IntervalError, match="share no seed"):
        agreement_interval(fixed.assign(seed=9), "ece", ce)
    with pytest.raises(IntervalError, match="different documents"):
        agreement_interval(fixed, "ece", ce.assign(document="other"))
    assert all(measure.label for measure in MEASURES.values())


# --- the store --------------------------------------------------------------------------------------------------

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "evaluations": 3, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        opened = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        opened.build_data()
        yield opened


def untrained(study: Study, spec) -> Run:
    """A run's folder with the weights it starts from: enough to be compared."""
    folder = study.store.path("runs", run_key(spec))
    folder.mkdir(parents=True, exist_ok=True)
    save_model(build_model(spec.model, spec.seed), folder)
    return Run(spec, run_key(spec), folder)


def test_rows_are_computed_once_for_each_run_and_name_their_arm(study, monkeypatch) -> None:
    teachers = [untrained(study, recipes.teacher_spec(study, seed)) for seed in (0, 1)]
    fixed, ce = ([untrained(study, recipes.student_spec(study, code, arm, seed)) for seed in (0, 1)
                  for code in ("en", "py")] for arm in ("fixed", "ce"))
    seen: list[int] = []
    count = agreement.compare_documents

    def counted(students, *args, **options):
        seen.append(len(students))
        return count(students, *args, **options)

    monkeypatch.setattr(agreement, "compare_documents", counted)
    first = agreement_rows(study, {"fixed": fixed}, teachers)
    assert seen == [1, 1, 1, 1]  # a pass for each teacher and language
    both = agreement_rows(study, {"fixed": fixed, "twin": fixed, "ce": ce}, teachers)
    assert seen == [1] * 8 and list(dict.fromkeys(both.documents["arm"])) == ["fixed", "twin", "ce"]
    pd.testing.assert_frame_equal(
        first.documents, both.documents[both.documents["arm"] == "fixed"].reset_index(drop=True)
    )
    assert set(both.documents["run"]) == {run.key for run in fixed + ce}
    counts = both.documents.groupby(["arm", "seed", "language"])["document"].nunique()
    assert counts.nunique() == 1 and len(counts) == 3 * 2 * 2
    damaged = next(study.store.root.glob("scores/*/bins.parquet"))
    damaged.write_bytes(b"")
    agreement_rows(study, {"fixed": fixed, "ce": ce}, teachers)
    assert len(seen) == 9
    with pytest.raises(MomeError, match="not among the teachers"):
        agreement_rows(study, {"fixed": fixed}, teachers[:1])
    other = dataclasses.replace(fixed[0], spec=dataclasses.replace(fixed[0].spec, seed=5, teacher=None, objective=None))
    with pytest.raises(MomeError, match="seed 5"):
        agreement_rows(study, {"x": [other]}, teachers)
