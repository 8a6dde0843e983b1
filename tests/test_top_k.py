"""A teacher kept as k tokens: what comes back, what a loss of it is worth, and training from it."""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mome_utils import recipes, runs, top_k
from mome_utils.artifacts import MissingArtifact
from mome_utils.config import MomeError
from mome_utils.distillation import OBJECTIVES, Objective
from mome_utils.divergences import DIVERGENCES
from mome_utils.fused import fused_losses
from mome_utils.runs import cache_sparse, run_key, sparse_key, store_sparse, train_or_load
from mome_utils.study import Study
from mome_utils.top_k import SparseCache, SparseHead, checked, encode, pack

V = 37


def teacher(rows: int = 60, vocabulary: int = V, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Logits [rows, vocabulary] in float64."""
    drawn = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=drawn, dtype=torch.float64)


def back(logits: torch.Tensor, cache: SparseCache, seed: int = 0) -> torch.Tensor:
    """The distribution [..., V] that comes back of logits, as a loss sees it."""
    packed = pack(encode(logits, cache, torch.Generator().manual_seed(seed)))
    assert packed.dtype == torch.int16
    return SparseHead(cache, logits.shape[-1])(packed).double().softmax(-1)


# ------------------------------------------------------------------ what is kept, and what comes back


@settings(max_examples=30, deadline=None, derandomize=True)
@given(k=st.integers(1, V), seed=st.integers(0, 9), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_the_tail_is_spread_evenly_or_left_out(k, seed, scale):
    p = teacher(seed=seed, scale=scale).softmax(-1)
    order = p.argsort(-1, descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order[:, :k], True)
    mass = torch.where(kept, p, 0).sum(-1, keepdim=True)
    smoothed, truncated = (back(p.log(), SparseCache(k, kind)) for kind in ("smoothed", "truncated"))
    torch.testing.assert_close(smoothed.sum(-1), torch.ones(len(p), dtype=torch.float64))
    torch.testing.assert_close(truncated, torch.where(kept, p, 0) / mass, rtol=0.02, atol=1e-3)
    even = torch.where(kept, p, (1 - mass) / max(1, V - k))
    torch.testing.assert_close(smoothed, even, rtol=0.02, atol=2e-3)
    assert (truncated[~kept] == 0).all() and (smoothed[p > 1e-30] > 0).all()
    # No token outside the k is more likely than one of the k: rounding must not reverse their order.
    least = torch.where(kept, smoothed, math.inf).amin(-1, keepdim=True)
    assert (torch.where(kept, 0, smoothed) <= least * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", ["smoothed", "truncated"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_all_tokens_are_the_exact_distribution_but_for_rounding(kind, scale):
    exact = teacher(scale=scale).log_softmax(-1)
    found = SparseHead(SparseCache(V, kind), V)(pack(encode(exact, SparseCache(V, kind)))).double().log_softmax(-1)
    # A log-probability l of float16 is wrong by up to |l| / 2,048, and so p by as much relatively.
    wrong = exact.abs() * 2**-11
    allowed = 1.01 * (wrong + (exact.exp() * wrong).sum(-1, keepdim=True)) + 1e-6  # its own error, and the sum's
    assert ((found - exact).abs() <= allowed).all()


def test_draws_are_right_in_the_mean_and_reproducible():
    logits = teacher(rows=2, scale=1.0)
    cache, p = SparseCache(5, "sampled"), logits.softmax(-1)
    draws = torch.stack([back(logits, cache, seed) for seed in range(2000)])
    assert (draws * 5 - (draws * 5).round()).abs().max() < 1e-5  # each draw is worth a fifth
    error = (p * (1 - p) / (5 * 2000)).sqrt()  # of the mean of 5 · 2,000 draws
    assert ((draws.mean(0) - p).abs() < 5 * error).all()
    assert torch.equal(back(logits, cache, 7), back(logits, cache, 7))
    assert set(encode(logits, cache)) == {"indices"}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
@pytest.mark.parametrize("kind", top_k.KINDS)
def test_indices_of_any_vocabulary_come_back(vocabulary, dtype, kind):
    logits = torch.full((3, vocabulary), -20.0)
    places = torch.tensor([0, 40_000, vocabulary - 1])
    logits[torch.arange(3), places] = 20.0
    cache = SparseCache(4, kind)
    parts = encode(logits, cache)
    assert parts["indices"].dtype == dtype and parts["indices"].shape == (3, 4)
    assert torch.equal(SparseHead(cache, vocabulary)(pack(parts)).argmax(-1), places)
    assert sum(part[0].numel() * part.element_size() for part in parts.values()) == cache.bytes_per_token(vocabulary)


def test_logits_are_looked_at_in_chunks(monkeypatch):
    logits = teacher().view(4, 15, V)
    whole = encode(logits, SparseCache(6))
    monkeypatch.setattr(top_k, "CHUNK", 7 * V)
    pieces = encode(logits, SparseCache(6))
    assert whole["indices"].shape == (4, 15, 6)
    assert all(torch.equal(whole[name].view(torch.int16), pieces[name].view(torch.int16)) for name in whole)


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize(("name", "kind", "temperature"), [
    (name, kind, temperature) for name in sorted(DIVERGENCES) for kind in top_k.KINDS for temperature in (1.0, 2.0)
    if (name, kind) != ("reverse_kl", "truncated") and (kind != "sampled" or (name, temperature) == ("soft_ce", 1.0))
])
def test_losses_of_a_cache_are_those_of_its_distribution_in_float64(name, kind, temperature):
    """Loss and gradient in chunks from packed rows, against autograd on the whole distribution by hand."""
    drawn = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 8, 6, generator=drawn, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 6, generator=drawn, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (4, 8), generator=drawn)
    logits, cache = teacher(32).view(4, 8, V), SparseCache(9, kind)
    parts = encode(logits, cache, torch.Generator().manual_seed(0))
    objective = Objective(name, "fixed", temperature=temperature, micro_batches=2)
    found = fused_losses(
        objective, hidden, weight, pack(parts), SparseHead(cache, V), ids, [(True, True)] * 2, [(0.0, 1.0)] * 2
    )
    gradients = torch.autograd.grad(found.loss, (hidden, weight))

    kept = parts["log_probs"].double().exp() if kind != "sampled" else torch.full((4, 8, 9), 1 / 9).double()
    rest = (1 - kept.sum(-1, keepdim=True)) / (V - 9) if kind == "smoothed" else torch.zeros(4, 8, 1).double()
    p = torch.zeros(4, 8, V).double().scatter_add_(-1, parts["indices"].long(), kept)
    p = torch.where(p > 0, p, rest)
    p = p ** (1 / temperature)
    p = p / p.sum(-1, keepdim=True)
    q = ((hidden @ weight.T) / temperature).softmax(-1)

    def kl(a, b):
        return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0).sum(-1)

    value = {
        "soft_ce": lambda: -(p * q.log()).sum(-1), "forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * q), "skew_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()
    exact = (value * temperature ** DIVERGENCES[name].scale)[:, :-1].mean()
    assert found.loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused():
    with pytest.raises(MomeError, match="one token of each position or more, not 0"):
        SparseCache(0)
    with pytest.raises(MomeError, match="Unknown kind of cache 'nucleus'"):
        SparseCache(3, "nucleus")
    with pytest.raises(MomeError, match=f"choose k up to {V}"):
        encode(teacher(), SparseCache(V + 1))
    with pytest.raises(MomeError, match="reverse_kl is infinite"):
        SparseCache(3, "truncated").check(Objective("reverse_kl"), V)
    for objective in (Objective("jensen_shannon"), Objective("soft_ce", temperature=2.0)):
        with pytest.raises(MomeError, match="linear in its probabilities"):
            SparseCache(3, "sampled").check(objective, V)
    for name in OBJECTIVES:
        SparseCache(3).check(Objective(name), V)


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: {"indices": p["indices"]}, "consists of indices and log_probs"),
    (lambda p: {name: part[:, :2] for name, part in p.items()}, "needs 3 tokens, not 2"),
    (lambda p: {**p, "indices": p["indices"].int() + V}, "outside the student's vocabulary"),
    (lambda p: {**p, "indices": torch.zeros_like(p["indices"])}, "names a token twice"),
    (lambda p: {**p, "log_probs": p["log_probs"] / -1.0}, "sum to more than 1"),
    (lambda p: {**p, "log_probs": p["log_probs"] * math.nan}, "no finite log-probability"),
    (lambda p: {**p, "log_probs": p["log_probs"] - math.inf}, "no finite log-probability"),
])
def test_rows_of_an_api_that_cannot_be_are_refused(change, message):
    cache = SparseCache(3)
    parts = encode(teacher(), cache)
    assert all(torch.equal(part.view(torch.int16), checked(parts, cache, V)[name].view(torch.int16))
               for name, part in parts.items())
    with pytest.raises(MomeError, match=message):
        checked(change(parts), cache, V)


# ------------------------------------------------------------------ training from it

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "expert": [1, 16, 2], "teacher_epochs": 0.05, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4,
    "evaluations": 1, "evaluation_blocks": 2, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        study.build_data()
        study.cache_teachers(study.runs([recipes.teacher_spec(study, 0)]))
        yield study


def fixed(study, cache, divergence="soft_ce"):
    spec = recipes.student_spec(study, "en", "fixed", 0)
    goal = dataclasses.replace(spec.objective, divergence=divergence)
    return dataclasses.replace(
        spec, cache=cache, objective=goal, snapshots=(), steps=15, evaluations=1, learning_rate=0.01
    )


def test_a_run_from_all_tokens_is_the_run_from_the_states(study):
    vocabulary = len(study.data().tokenizer)
    run = study.runs([recipes.teacher_spec(study, 0)])[0]
    states = train_or_load(fixed(study, None), study.store, study.data())
    gaps = {}
    for cache in (SparseCache(vocabulary), SparseCache(1, "truncated")):
        spec = fixed(study, cache)
        with pytest.raises(MissingArtifact, match="not there yet: make it with"):
            study.runs([spec])
        cache_sparse(study.store, study.data(), run, "en", cache)
        found = train_or_load(spec, study.store, study.data())
        assert found.key != states.key
        histories = [history.history()[["ce", "kd", "loss"]].to_numpy() for history in (states, found)]
        gaps[cache.k] = np.abs(histories[0] - histories[1]).max()
    assert gaps[vocabulary] < 2e-3 < 0.1 < gaps[1]
    assert len({run_key(fixed(study, cache)) for cache in (
        None, SparseCache(4), SparseCache(5), SparseCache(4, "sampled"), SparseCache(4, "truncated"))}) == 5


def test_a_run_in_chunks_is_the_run_of_whole_logits(study, monkeypatch):
    cache = SparseCache(8, "sampled")
    cache_sparse(study.store, study.data(), study.runs([recipes.teacher_spec(study, 0)])[0], "en", cache)
    spec = fixed(study, cache, "forward_kl")
    chunked = train_or_load(spec, study.store, study.data())
    history = chunked.history()
    assert history["loss"].tail(5).mean() < history["loss"].head(5).mean()
    shutil.rmtree(chunked.folder)
    monkeypatch.setattr("mome_utils.kd_training.covers", lambda objective: False)
    whole = train_or_load(spec, study.store, study.data()).history()
    np.testing.assert_allclose(history.to_numpy(), whole.to_numpy(), rtol=2e-3, atol=2e-4)


def test_a_teacher_of_another_library_needs_no_run(study):
    """Tokens and log-probabilities alone, under a name: here of a teacher that always says the same."""
    data, cache = study.data(), SparseCache(2)
    asked = []

    def api(ids):
        asked.append(len(ids))
        return {"indices": torch.tensor([5, 9]).expand(*ids.shape, 2),
                "log_probs": torch.tensor([0.6, 0.3]).log().expand(*ids.shape, 2)}

    folder = store_sparse(study.store, data, "an API", "en", cache, api)
    assert sum(asked) == len(data.block_array("train", "en"))
    assert store_sparse(study.store, data, "an API", "en", cache, api) == folder
    assert sum(asked) == len(data.block_array("train", "en")), "it is asked once"
    spec = dataclasses.replace(fixed(study, cache), teacher="an API")
    run = study.runs([spec])[0]
    p = run.model()(torch.from_numpy(data.block_array("validation", "en")[:2].astype(np.int64))).logits.softmax(-1)
    before = 1 / len(data.tokenizer)
    assert p[..., [5, 9]].mean() > 2 * before


def test_a_cache_is_stored_once_and_made_again_when_damaged(study):
    data, cache = study.data(), SparseCache(8)
    run = study.runs([recipes.teacher_spec(study, 0)])[0]
    file = cache_sparse(study.store, data, run, "py", cache) / "rows.safetensors"
    before = {name: part.clone() for name, part in load_file(file).items()}
    n = len(data.block_array("train", "py"))
    assert before["indices"].shape == before["log_probs"].shape == (n, data.block_size, 8)
    assert (before["indices"].dtype, before["log_probs"].dtype) == (torch.uint16, torch.float16)
    with torch.inference_mode():
        ids = torch.from_numpy(data.block_array("train", "py")[-2:].astype(np.int64))
        exact = run.model()(ids).logits.log_softmax(-1).topk(8)
    torch.testing.assert_close(before["log_probs"][-2:].float(), exact.values, rtol=1e-3, atol=1e-4)
    file.write_bytes(b"cut")
    again = load_file(cache_sparse(study.store, data, run, "py", cache) / "rows.safetensors")
    assert all(torch.equal(before[name].view(torch.int16), again[name].view(torch.int16)) for name in before)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_stored(study):
    data, cache = study.data(), SparseCache(2)
    v = len(data.tokenizer)
    for name, source, message in (
        ("wide", lambda ids: torch.zeros(*ids.shape, v + 1), "do not fit blocks"),
        ("short", lambda ids: encode(torch.zeros(*ids[:, 1:].shape, v), cache), "give them for every position"),
    ):
        with pytest.raises(MomeError, match=message):
            store_sparse(study.store, data, name, "en", cache, source)
        assert not study.store.has(runs.SPARSE, sparse_key(name, data.fingerprint, "en", cache))
    spec = fixed(study, None)
    with pytest.raises(MomeError, match=f"choose k up to {v}"):
        dataclasses.replace(spec, cache=SparseCache(v + 1))
    with pytest.raises(MomeError, match="has no use for a teacher's cache"):
        dataclasses.replace(spec, cache=cache, objective=None, teacher=None)
    store_sparse(study.store, data, "plain", "en", cache, lambda ids: torch.zeros(*ids.shape, v))
    larger = dataclasses.replace(spec.model, vocab_size=v + 8)
    wider = dataclasses.replace(spec, teacher="plain", cache=cache, model=larger)
    with pytest.raises(MomeError, match=f"has a vocabulary of {v}, the student one of {v + 8}"):
        train_or_load(wider, study.store, data)
