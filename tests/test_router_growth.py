"""A router that learns one language more: what was there stays, and what is new is recognized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from mome_utils.bakeoff import document_blocks
from mome_utils.config import MomeError
from mome_utils.corpus import load_corpus
from mome_utils.router_calibration import calibrate
from mome_utils.router_fit import Crops, count_tokens, fit_router, token_statistics
from mome_utils.router_growth import add_language, pseudo_sequences
from mome_utils.routing import TokenRouter
from mome_utils.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60
LANGUAGES = ("en", "fr", "de", "py", "it")


def synthetic(number: int = 40, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences [number, length] of five languages; the last one alone uses the ids 50 and above."""
    chances = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.4), size=len(LANGUAGES))
    chances[:-1, 50:] = 0
    generator = np.random.default_rng((1, seed))
    return {
        name: generator.choice(VOCAB, size=(number, length), p=chance / chance.sum())
        for name, chance in zip(LANGUAGES, chances, strict=True)
    }


@pytest.fixture(scope="module")
def grown():
    """A router of four languages, and the same with a fifth."""
    blocks = synthetic()
    added = blocks.pop("it")
    router = calibrate(fit_router(blocks, VOCAB, crops=Crops(2)), blocks)
    router.abstain_below = 0.4
    return router, add_language(router, "it", added, crops=Crops(2))


def test_all_that_was_there_stays_bit_by_bit(grown):
    old, new = grown
    assert old.languages == LANGUAGES[:4] and new.languages == LANGUAGES and new.vocab_size == old.vocab_size
    for name, before in old.state_dict().items():
        after = new.get_buffer(name)
        assert torch.equal(after[:4] if name in ("weight", "bias", "statistics", "concentration") else after, before)
    assert new.abstain_below == 0.4
    totals, concentration = token_statistics(count_tokens(synthetic()["it"], VOCAB))
    assert new.statistics[4].tolist() == totals.tolist() and new.concentration[4] == concentration


def test_the_order_of_the_old_rows_is_the_same_on_every_input(grown):
    old, new = grown
    unseen = (old.idf == 0).nonzero().ravel().tolist()
    assert set(range(50, VOCAB)) <= set(unseen)  # ids that only the new language has

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, VOCAB - 1) | st.sampled_from(unseen), max_size=40))
    def check(sequence: list[int]) -> None:
        ids = torch.tensor([sequence], dtype=torch.int64)
        before, after = old(ids)[0], new(ids)[0, :4]
        torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
        assert torch.equal(after.argsort(stable=True), before.argsort(stable=True))
        route = new.route(ids).item()
        assert route in (new.languages.index("it"), -1) or route == before.argmax()

    check()


def test_the_new_language_is_recognized_nearly_as_well_as_when_all_are_fitted_together():
    """Each language of the embedded corpus comes last once; the others' text is then out of reach."""
    corpus = load_corpus("embedded", topics=60, root=ROOT)
    documents = {name: sorted(corpus.of_language(name), key=lambda d: d.id) for name in corpus.languages}
    tokenizer = train_tokenizer([d.text for part in documents.values() for d in part[:40]], 700)
    train = {name: document_blocks(tokenizer, part[:40], 64)[0] for name, part in documents.items()}
    cut = {name: document_blocks(tokenizer, part[40:], 64)[0] for name, part in documents.items()}
    test = {name: [block for block in blocks if len(block) == 64] for name, blocks in cut.items()}

    def right(router: TokenRouter) -> float:
        """Share of the held-out blocks, languages weighing the same."""
        routes = {g: router.route(torch.from_numpy(np.stack(part))) for g, part in test.items()}
        return float(np.mean([(row == router.languages.index(g)).double().mean() for g, row in routes.items()]))

    def fitted(names: list[str]) -> TokenRouter:
        part = {name: train[name] for name in names}
        return fit_router(part, 700, crops=Crops(1), model=LogisticRegression(C=10, max_iter=2000))

    together = right(fitted(list(train)))
    assert together > 0.985
    for last in train:
        router = add_language(fitted([g for g in train if g != last]), last, train[last], crops=Crops(1))
        assert right(router) > together - 0.02, last


def test_growth_repeats_exactly_and_by_seed():
    blocks = synthetic(10)
    added = blocks.pop("it")
    router = fit_router(blocks, VOCAB)
    first, again, other = (add_language(router, "it", added, crops=Crops(1), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    tame = add_language(router, "it", added, strength=0.01)
    assert tame.weight[4].norm() < first.weight[4].norm()
    twice = add_language(first, "nl", blocks["en"][:, ::-1] + 1)
    assert twice.languages == (*LANGUAGES, "nl") and torch.equal(twice.weight[:5], first.weight)


def test_the_new_row_is_the_best_logistic_regression_next_to_the_old_rows(grown):
    """No small change of the row lowers its objective: the gradient is zero, computed here from probabilities."""
    blocks = synthetic()
    added = blocks.pop("it")
    old = fit_router(blocks, VOCAB)
    new = add_language(old, "it", added, strength=2.0, seed=3)
    seeds = np.random.SeedSequence(3).generate_state(4).tolist()
    stands = [pseudo_sequences(old.statistics[i].numpy(), old.concentration[i].item(), [16] * 40, s)
              for i, s in enumerate(seeds)]
    ids = torch.from_numpy(np.concatenate([added, *stands]))
    wrong = new(ids).softmax(1)[:, 4] - (torch.arange(200) < 40).double()
    features = torch.stack([torch.bincount(row, minlength=VOCAB) for row in ids]) * old.idf
    features /= features.norm(dim=1, keepdim=True)
    gradient = 2.0 * wrong @ features + new.weight[4]
    assert gradient.abs().max() < 1e-2 and abs(float(wrong.sum())) < 1e-2
    assert (2.0 * wrong @ features).abs().max() > 0.1  # it is the regularization that balances it


def test_pseudo_sequences_have_the_statistics_they_are_made_from():
    totals = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.5)) * 1000
    totals[7] = 0
    for alpha in (5.0, 50.0):
        sequences = pseudo_sequences(totals, alpha, [40] * 1500, seed=1)
        again, found = token_statistics(count_tokens(sequences, VOCAB))
        assert found == pytest.approx(alpha, rel=0.2) and again[7] == 0
        assert np.abs(again / again.sum() - totals / totals.sum()).max() < 0.02
    lengths = [3, 0, 7]
    assert [len(sequence) for sequence in pseudo_sequences(totals, 5.0, lengths, seed=0)] == lengths
    assert pseudo_sequences(totals, 5.0, [], seed=0) == []


def test_growth_refuses_what_it_cannot_do(grown):
    router = grown[0]
    with pytest.raises(MomeError, match="already knows 'fr'"):
        add_language(router, "fr", [[1, 2]])
    with pytest.raises(MomeError, match="without text for it"):
        add_language(router, "it", [])
    with pytest.raises(MomeError, match="outside the router's vocabulary"):
        add_language(router, "it", [[VOCAB]])
    with pytest.raises(MomeError, match="keeps no statistics"):
        add_language(TokenRouter(VOCAB, ("en", "fr")), "it", [[1, 2]])
