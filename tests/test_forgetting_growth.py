"""A mixture that grows by experts: scores of each stage, proofs, and routers that grow with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import score_documents
from mome_utils.forgetting_growth import grow_routers, prove_growth, score_growing
from mome_utils.models import build_gpt2
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_settings import score_settings
from mome_utils.router_fit import fit_router
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)

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


def blocks_of(tokenizer, size=12):
    ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in TEXTS.items()}
    return {name: np.array([own[i : i + size] for i in range(0, 36, 4)]) for name, own in ids.items()}


def test_routers_that_grow_add_a_row_and_keep_the_others(mixture):
    _, tokenizer, _ = mixture
    routers = grow_routers(blocks_of(tokenizer), len(tokenizer))
    assert routers[0] is None and [r.languages for r in routers[1:]] == [LANGUAGES[:2], LANGUAGES]
    assert torch.equal(routers[2].weight[:2], routers[1].weight)
    with pytest.raises(MomeError, match="two languages on"):
        grow_routers({"en": blocks_of(tokenizer)["en"]}, len(tokenizer))


def test_grown_routes_are_those_of_each_stages_own_router(mixture):
    model, tokenizer, documents = mixture
    routers = grow_routers(blocks_of(tokenizer), len(tokenizer))
    rows = score_growing(model, tokenizer, documents, block_size=16, stride=8, routers=routers)
    assert set(rows["routes"]) == {"oracle", "router", "grown"}
    for stage, router in enumerate(routers, start=1):

        def logits(ids, router=router):
            routes = torch.zeros(len(ids), dtype=torch.long) if router is None else router(ids).argmax(-1)
            return model(ids, routes=routes).logits

        slow = score_documents(logits, tokenizer, documents, block_size=16, stride=8, batch_size=1)
        fast = rows[(rows["routes"] == "grown") & (rows["stage"] == stage)]
        np.testing.assert_allclose(fast["nats"], slow["nats"], rtol=1e-5)


def test_a_model_of_each_stage_is_scored_in_its_stage(mixture):
    """Where experts go on changing, each stage has a model of its own: here all but the last are others."""
    model, tokenizer, documents = mixture
    sizes = {"vocab_size": len(tokenizer), "block_size": 16, "bos": 1, "eos": 2}
    others = {name: build_gpt2(Shape(1, 16, 2), seed=9 + i, **sizes) for i, name in enumerate(LANGUAGES)}
    young = MomeForCausalLM.from_experts(others, model.router).eval()
    rows = score_growing([young, young, model], tokenizer, documents, block_size=16, stride=8)
    for stage, which in [(1, young), (2, young), (3, model)]:
        alone = score_growing(which, tokenizer, documents, block_size=16, stride=8)
        pick = lambda table, stage=stage: table[table["stage"] == stage].set_index(["routes", "document", "language"])  # noqa: E731
        np.testing.assert_allclose(pick(rows)["nats"], pick(alone)["nats"], rtol=1e-6)
    with pytest.raises(MomeError, match="in as many stages"):
        score_growing([model, model], tokenizer, documents, block_size=16, stride=8)


def test_growing_is_proved_to_the_bit_and_a_change_is_found(mixture, monkeypatch):
    _, tokenizer, _ = mixture
    sizes = {"vocab_size": len(tokenizer), "block_size": 16, "bos": 1, "eos": 2}
    experts = {name: build_gpt2(Shape(1, 16, 2), seed=i, **sizes).eval() for i, name in enumerate(LANGUAGES)}
    ids = {name: torch.from_numpy(own) for name, own in blocks_of(tokenizer).items()}
    proof = prove_growth(experts, ids)
    assert list(zip(proof["added"], proof["language"], strict=True)) == [("fr", "en"), ("py", "en"), ("py", "fr")]
    assert proof["equal"].all() and (proof["numbers"] == ids["en"].numel() * len(tokenizer)).all()
    add = MomeForCausalLM.add_expert

    def careless(self, *args, **kwargs):
        add(self, *args, **kwargs)
        with torch.no_grad():
            self.experts[0].transformer.ln_f.weight[0] += 1e-6

    monkeypatch.setattr(MomeForCausalLM, "add_expert", careless)
    assert list(prove_growth(experts, ids)["equal"]) == [True, False, True]
