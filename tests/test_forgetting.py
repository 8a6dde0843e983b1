"""Forgetting metrics against hand-computed matrices and against plain loops on random ones."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mome_utils.config import Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import score_documents
from mome_utils.forgetting import (
    METRICS,
    ForgettingError,
    average_performance,
    backward_transfer,
    first_language_forgetting,
    forgetting,
    forgetting_by_language,
    forward_transfer,
    gradient_cosines,
    metric_interval,
    metric_table,
    r_matrix,
    rise_since_best,
    score_growing,
    stage_bands,
)
from mome_utils.models import build_gpt2
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_settings import score_settings
from mome_utils.router_fit import fit_router
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)

# Three languages: the first is learned to 1.0 and ends at 3.0; the second was best before its own stage.
R = np.array([[1.0, 4.0, 6.0], [2.0, 5.0, 5.5], [3.0, 4.5, 2.0]])


def test_hand_computed_matrix():
    assert average_performance(R) == pytest.approx((3.0 + 4.5 + 2.0) / 3)
    assert forgetting_by_language(R) == pytest.approx([2.0, 0.5, -3.5])
    assert forgetting(R) == pytest.approx(1.25)
    assert first_language_forgetting(R) == pytest.approx(2.0)
    assert rise_since_best(R) == pytest.approx(-1 / 3)
    assert backward_transfer(R) == pytest.approx(((1.0 - 3.0) + (5.0 - 4.5)) / 2)
    assert forward_transfer(R, np.array([8.0, 8.0, 8.0])) == pytest.approx(((8 - 4.0) + (8 - 5.5)) / 2)


def test_experts_that_never_change_forget_nothing():
    frozen = np.array([[1.0, 9.0, 9.0], [1.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    assert forgetting(frozen) == 0 and backward_transfer(frozen) == 0


def loops(scores: list[list[float]], untrained: list[float]) -> dict[str, float]:
    """The metrics once more, from their definitions, without arrays."""
    stages = len(scores)
    last = scores[stages - 1]
    forgotten, backward, forward = 0.0, 0.0, 0.0
    for j in range(stages - 1):
        best = math.inf
        for stage in range(stages - 1):
            if scores[stage][j] < best:
                best = scores[stage][j]
        forgotten += last[j] - best
        backward -= last[j] - scores[j][j]
    for j in range(1, stages):
        forward += untrained[j] - scores[j - 1][j]
    total = 0.0
    for value in last:
        total += value
    count = stages - 1
    return {
        "average": total / stages,
        "forgetting": forgotten / count,
        "backward": backward / count,
        "forward": forward / count,
    }


@given(st.integers(2, 6).flatmap(lambda n: arrays(float, (n + 1, n), elements=st.floats(0.1, 20))))
@settings(max_examples=200, deadline=None)
def test_metrics_agree_with_loops_on_random_matrices(values):
    untrained, scores = values[0], values[1:]
    expected = loops(scores.tolist(), untrained.tolist())
    assert average_performance(scores) == pytest.approx(expected["average"])
    assert forgetting(scores) == pytest.approx(expected["forgetting"])
    assert backward_transfer(scores) == pytest.approx(expected["backward"])
    assert forward_transfer(scores, untrained) == pytest.approx(expected["forward"])
    # The best earlier score is no worse than the one right after the language's own stage.
    assert forgetting(scores) >= -backward_transfer(scores) - 1e-9
    stacked = np.stack([scores, scores + 1])
    for metric in METRICS.values():
        assert metric.function(stacked).shape == (2,)
        assert metric.function(stacked)[0] == pytest.approx(float(metric.function(scores)))


def rows_of(matrices: dict[int, np.ndarray], languages: dict[int, list[str]], noise=0.0) -> pd.DataFrame:
    """Rows whose scores are the matrices (plus noise between documents): 10 documents of 50 bytes."""
    generator = np.random.default_rng(0)
    rows = []
    for seed, matrix in matrices.items():
        for i, stage in enumerate(matrix):
            for language, value in zip(languages[seed], stage, strict=True):
                for name in range(10):
                    nats = (value + generator.normal(0, noise)) * 50 * math.log(2)
                    rows.append((seed, i + 1, language, f"d{name}", nats, 50, 20))
    return pd.DataFrame(rows, columns=["seed", "stage", "language", "document", "nats", "bytes", "tokens"])


def test_the_matrix_is_read_from_rows_in_the_order_of_learning():
    order = ["fr", "en", "py"]  # not alphabetic
    rows = rows_of({0: R, 1: R + 2}, {0: order, 1: order})
    np.testing.assert_allclose(r_matrix(rows, order), R + 1)
    np.testing.assert_allclose(r_matrix(rows, order, stages=[1, 3]), (R + 1)[[0, 2]])
    np.testing.assert_allclose(r_matrix(rows.sample(frac=1, random_state=1), order), R + 1)
    np.testing.assert_allclose(r_matrix(rows, ["en", "py"], stages=[1, 2, 3]), (R + 1)[:, 1:])
    other = r_matrix(rows, order, measure="nats_per_token")
    np.testing.assert_allclose(other, (R + 1) * 50 * math.log(2) / 20)


def test_intervals_of_metrics_with_an_order_of_each_seeds_own():
    orders = {0: ["fr", "en", "py"], 1: ["py", "fr", "en"], 2: ["en", "py", "fr"]}
    rows = rows_of(dict.fromkeys(orders, R), orders)
    found = metric_interval(rows, orders, first_language_forgetting)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.seeds, found.documents) == (3, 10)
    noisy = metric_interval(rows_of(dict.fromkeys(orders, R), orders, noise=0.3), orders, forgetting)
    assert noisy.low < noisy.estimate < noisy.high


def test_the_table_holds_every_metric_of_every_arm():
    order = ["fr", "en", "py"]
    rows = rows_of({0: R, 1: R, 2: R}, dict.fromkeys(range(3), order))
    table = metric_table({"sequential": rows, "single session": rows}, order)
    assert len(table) == 2 * len(METRICS)
    estimates = table.set_index(["arm", "metric"])["estimate"]
    assert estimates["sequential", "forgetting"] == pytest.approx(1.25)


def test_stage_bands_follow_one_another():
    assert stage_bands(["en", "fr"], [10, 25]) == [(0, 10, "en"), (10, 25, "fr")]
    for ends in ([10], [25, 10], [0, 10]):
        with pytest.raises(ForgettingError, match="stage ends"):
            stage_bands(["en", "fr"], ends)


def test_incomplete_scores_are_refused_in_one_sentence():
    order = ["fr", "en", "py"]
    rows = rows_of({0: R}, {0: order})
    with pytest.raises(ForgettingError, match="no column 'stage'"):
        r_matrix(rows.drop(columns="stage"), order)
    with pytest.raises(ForgettingError, match="lack some"):
        r_matrix(rows[rows["stage"] != 2], order)
    with pytest.raises(ForgettingError, match="order per seed"):
        metric_interval(rows, {1: order}, forgetting)
    with pytest.raises(ForgettingError, match="one stage per language"):
        forgetting(R[:2])
    with pytest.raises(ForgettingError, match="at least two"):
        forgetting_by_language(R[:1])


# --- a mixture that grows --------------------------------------------------------------------------------

LANGUAGES = ("en", "fr", "py")
TEXTS = {
    "en": "the pebbles lie in rows of three and the line is long " * 3,
    "fr": "les cailloux sont posés en rangées de trois, l'été " * 3,
    "py": "def rows(n):\n    return [n % 3 for n in range(n)]\n" * 3,
}


@pytest.fixture(scope="module")
def mixture():
    """Three untrained experts behind a router fitted on the texts they will be scored on."""
    tokenizer = train_tokenizer([*TEXTS.values()] * 3, 300)
    sizes = {"vocab_size": len(tokenizer), "block_size": 16, "bos": 1, "eos": 2}
    experts = {name: build_gpt2(Shape(1, 16, 2), seed=i, **sizes) for i, name in enumerate(LANGUAGES)}
    blocks = {}
    for name, text in TEXTS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        blocks[name] = np.array([ids[i : i + 12] for i in range(0, 36, 4)])
    router = fit_router(blocks, len(tokenizer))
    model = MomeForCausalLM.from_experts(experts, router).eval()
    documents = [
        Document(f"{i}", name, "g", "t", text[i:]) for name, text in TEXTS.items() for i in (0, 7)
    ] + [Document("mixed", "en", "g", "t", TEXTS["py"] + TEXTS["fr"])]
    return model, tokenizer, documents


@pytest.fixture(scope="module")
def grown(mixture):
    model, tokenizer, documents = mixture
    return score_growing(model, tokenizer, documents, block_size=16, stride=8, batch_size=5)


def test_oracle_routes_forget_nothing_at_all(grown):
    nats = grown[grown["routes"] == "oracle"].pivot_table(
        index=["language", "document"], columns="stage", values="nats"
    )
    for stage, language in enumerate(LANGUAGES, start=1):
        own = nats.loc[language].loc[:, stage:].to_numpy()
        assert (own == own[:, :1]).all()  # to the bit, from the language's own stage on


def test_the_last_stage_is_the_routed_score_of_the_whole_mixture(mixture, grown):
    model, tokenizer, documents = mixture
    expected = score_settings(model, tokenizer, documents, block_size=16, stride=8).set_index("setting")
    for routes, setting in [("router", "routed"), ("oracle", "routed, true language")]:
        last = grown[(grown["routes"] == routes) & (grown["stage"] == 3)]
        np.testing.assert_allclose(last["nats"], expected.loc[setting, "nats"], rtol=1e-5)
        assert list(last["tokens"]) == list(expected.loc[setting, "tokens"])


def test_each_stage_agrees_with_one_forward_pass_per_window(mixture, grown):
    model, tokenizer, documents = mixture
    for stage in (1, 2, 3):

        def logits(ids, stage=stage):
            return model(ids, routes=model.router(ids)[:, :stage].argmax(-1)).logits

        slow = score_documents(logits, tokenizer, documents, block_size=16, stride=8, batch_size=1)
        fast = grown[(grown["routes"] == "router") & (grown["stage"] == stage)]
        np.testing.assert_allclose(fast["nats"], slow["nats"], rtol=1e-5)


def test_gradient_cosines_predict_what_a_small_step_does(mixture):
    model, tokenizer, _ = mixture
    expert = model.experts[0].double()
    ids = {
        name: torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:16]])
        for name, text in TEXTS.items()
    }
    table = gradient_cosines(expert, {name: (batch, batch) for name, batch in ids.items()})
    np.testing.assert_allclose(np.diag(table), 1)
    np.testing.assert_allclose(table, table.T)

    def loss(name):  # in float64; the model's own loss is float32
        return torch.nn.functional.cross_entropy(expert(input_ids=ids[name]).logits[0, :-1], ids[name][0, 1:])

    before = loss("en")
    length = torch.cat([g.flatten() for g in torch.autograd.grad(before, list(expert.parameters()))]).norm()
    expert.zero_grad()
    loss("fr").backward()
    norm = torch.cat([p.grad.flatten() for p in expert.parameters()]).norm()
    step = 1e-6
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter -= step * parameter.grad / norm
        after = loss("en")
    assert (after - before).item() == pytest.approx(-step * table.loc["en", "fr"] * length.item(), rel=1e-3)
