"""Who answers at inference: active experts, the fallback, weighed answers, and texts that change their expert."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from moe_models import EOS, LANGUAGES, VOCABULARY, build, fitted, mixed_batch, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from mome_utils.config import MomeError
from mome_utils.moe_config import COMMON, VARIANTS, MomeConfig
from mome_utils.moe_dispatch import Dispatch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def router():
    return fitted()


@pytest.fixture(params=VARIANTS)
def model(request, router):
    return build(request.param, router)


@pytest.fixture(scope="module")
def mixed():
    return mixed_batch()


def answer(model, ids, weights: dict[str, float]) -> torch.Tensor:
    """Logits of one mixture of experts, from the single experts: written out, as the variants define it."""
    if model.config.variant == "ple":
        logs = [w * model.head(n)(model.expert_hidden(n, ids)).log_softmax(-1) for n, w in weights.items()]
        return sum(logs).log_softmax(-1)
    return model.lm_head(sum(w * model.expert_hidden(n, ids) for n, w in weights.items()))


def same(model, logits, expected) -> None:
    if model.config.variant == "ple":
        logits, expected = logits.log_softmax(-1), expected.log_softmax(-1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- active


def test_the_router_chooses_among_the_active_experts_only(model, mixed):
    ids, languages = mixed
    scores, before = model.router(ids), model(ids).logits
    model.set_active(["py", "en"])  # in any order
    assert model.active == ("en", "py") and model.config.active_experts == ["en", "py"]
    places = torch.tensor([0, 3])
    expected = places[scores[:, places].argmax(1)]
    assert torch.equal(model.route(ids), expected)
    assert torch.equal(model(ids).logits, model(ids, routes=expected).logits)
    known = (languages == 0) | (languages == 3)
    assert torch.equal(model.route(ids)[known], languages[known])
    found = model.router_probabilities(ids)
    assert (found[:, [1, 2]] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(ids), dtype=torch.float64))
    model.set_active(None)
    assert model.active == LANGUAGES and torch.equal(model(ids).logits, before)


def test_wrong_active_experts_get_one_sentence(model, mixed):
    with pytest.raises(MomeError, match="no expert 'it' to be active: its experts are en, fr, de, py"):
        model.set_active(["en", "it"])
    with pytest.raises(MomeError, match="At least one expert must be active"):
        model.set_active([])
    assert model.active == LANGUAGES
    model.set_active(["en"])
    with pytest.raises(MomeError, match="route 2 leads to the expert 'de', which is not active"):
        model(mixed[0][:1], routes=torch.tensor([2]))
    with pytest.raises(MomeError, match="which is not active"):
        model(mixed[0][:1], expert_weights=torch.tensor([[0.5, 0.5, 0, 0, 0]]))
    with pytest.raises(MomeError, match="no combine='best'"):
        MomeConfig(combine="best")


# ----------------------------------------------------------------------------------------- fallback


def unsure(model, mixed) -> torch.Tensor:
    """Let the router abstain on about half of the batch; which rows those are."""
    largest = model.router_probabilities(mixed[0]).amax(1)
    model.router.abstain_below = float(largest.sort().values[4])
    unknown = largest < model.router.abstain_below
    assert 0 < int(unknown.sum()) < len(unknown)
    return unknown


def test_where_the_router_abstains_the_fallback_answers(model, mixed):
    ids, languages = mixed
    unknown = unsure(model, mixed)
    assert torch.equal(model.route(ids) == -1, unknown)
    logits, probabilities = model(ids).logits, model.router_probabilities(ids)
    for i, language in enumerate(languages):
        best = [LANGUAGES[j] for j in probabilities[i].sort(descending=True).indices[:2]]
        if model.config.variant == "moe_ce":
            weights = {COMMON: 1.0} if unknown[i] else {LANGUAGES[language]: 0.5, COMMON: 0.5}
        else:
            weights = dict.fromkeys(best, 0.5) if unknown[i] else {LANGUAGES[language]: 1.0}
        same(model, logits[i:i + 1], answer(model, ids[i:i + 1], weights))
    told = model(ids, routes=torch.where(unknown, -1, languages)).logits
    assert torch.equal(told, logits)


def test_the_fallback_asks_only_active_experts_and_no_absent_common_one(router, mixed):
    ids = mixed[0]
    model = build("moe_ce", router)
    everyone = torch.full((len(ids),), -1)
    torch.testing.assert_close(
        model(ids, routes=everyone).logits, answer(model, ids, {COMMON: 1.0}), atol=1e-6, rtol=1e-6
    )
    model.set_active(["fr", "py"])
    halves = answer(model, ids, {"fr": 0.5, "py": 0.5})
    torch.testing.assert_close(model(ids, routes=everyone, use_common=False).logits, halves, atol=1e-5, rtol=1e-5)
    model.set_active(["fr"])
    alone = answer(model, ids, {"fr": 1.0})
    torch.testing.assert_close(model(ids, routes=everyone, use_common=False).logits, alone, atol=1e-5, rtol=1e-5)


def test_a_fallback_without_common_expert_needs_a_router(mixed):
    model = build("jeet")
    with pytest.raises(MomeError, match="no fitted router"):
        model(mixed[0], routes=torch.full((8,), -1))
    with pytest.raises(MomeError, match="from 0 to 3, but lie from -2 to -2"):
        model(mixed[0], routes=torch.full((8,), -2))


# --------------------------------------------------------------------------------- weighed answers


def test_the_common_expert_weighs_what_the_router_leaves(router, mixed):
    ids, languages = mixed
    model = build("moe_ce", router)
    mean, sure = model(ids).logits, model.router_probabilities(ids).gather(1, languages[:, None])[:, 0].tolist()
    model.config.combine = "router"
    logits = model(ids).logits
    for i, language in enumerate(languages):
        expected = answer(model, ids[i:i + 1], {LANGUAGES[language]: sure[i], COMMON: 1 - sure[i]})
        torch.testing.assert_close(logits[i:i + 1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, mean)
    model.train()  # training is as published, whatever inference does
    assert torch.equal(model(ids, routes=languages).logits, mean)
    model.eval()
    assert torch.equal(model(ids, use_common=False).logits, model(ids, routes=languages, use_common=False).logits)


def test_any_mixture_of_experts_can_answer(model, mixed):
    ids = mixed[0]
    common = model.config.variant == "moe_ce"
    weights = torch.rand(8, 5, generator=torch.Generator().manual_seed(3))
    weights[1, 2] = weights[4, 0] = 0
    weights[:, -1] *= common
    weights /= weights.sum(1, keepdim=True)
    logits = model(ids, expert_weights=weights).logits
    for i, row in enumerate(weights.tolist()):
        named = {name: w for name, w in zip((*LANGUAGES, COMMON), row, strict=True) if w}
        same(model, logits[i:i + 1], answer(model, ids[i:i + 1], named))
    hard = model.mixing_weights(ids)
    assert torch.equal(model(ids, expert_weights=hard).logits, model(ids).logits)


@pytest.mark.parametrize("row", [
    [1.0, 1e-9, 0, 0, 0], [1.0, 5e-5, 0, 0, 0], [0, 1e-9, 0, 1.0, 0], [0.5, 1e-9, 0, 0, 0.5], [0.5, 5e-5, 0, 0, 0.5],
])
def test_a_weight_that_rounding_loses_changes_no_shape(model, mixed, row):
    ids = mixed[0][:2]
    if row[-1] and model.common is None:
        row = [*row[:-1], 0] if row[0] == 1 else [0.5, row[1], 0.5, 0, 0]
    weights = torch.tensor([row] * 2)
    logits = model(ids, expert_weights=weights).logits
    assert logits.shape == (2, ids.shape[1], VOCABULARY)
    named = {n: w / sum(row) for n, w in zip((*LANGUAGES, COMMON), row, strict=True) if w > 1e-6}
    same(model, logits, answer(model, ids, named))


def test_a_sure_router_leaves_the_common_expert_a_least_weight(router, mixed, monkeypatch):
    model, (ids, languages) = build("moe_ce", router), mixed
    model.config.combine = "router"
    certain = torch.nn.functional.one_hot(languages, 4).double()
    monkeypatch.setattr(type(model), "router_probabilities", lambda self, ids, mask=None: certain)
    weights = model.mixing_weights(ids, routes=languages)
    assert (weights[:, -1] == 2**-24).all() and (weights.sum(1) == 1).all()
    assert model(ids, expert_weights=weights, use_cache=True).past_key_values.common.get_seq_length() == 9


def test_wrong_weights_get_one_sentence(model, mixed):
    ids = mixed[0][:1]
    for weights, words in (
        (torch.ones(1, 4), "one row of 5 numbers"), (torch.ones(1, 5, dtype=torch.long), "one row of 5 numbers"),
        (torch.ones(1, 5), "add up to 1"), (torch.tensor([[2.0, -1, 0, 0, 0]]), "no negative number"),
        (torch.full((1, 5), torch.nan), "add up to 1"), (torch.full((2, 5), 0.2), "1 rows here, not .* shape .2, 5"),
    ):
        with pytest.raises(MomeError, match=words):
            model(ids, expert_weights=weights)
    if model.common is None:
        with pytest.raises(MomeError, match="has no common expert"):
            model(ids, expert_weights=torch.tensor([[0.5, 0, 0, 0, 0.5]]))


@pytest.mark.parametrize("routes", [
    torch.tensor([0]), torch.tensor([0, 1, 2]), torch.tensor([[0], [1]]), torch.tensor(1), torch.tensor([0.0, 1.0]),
])
def test_routes_are_one_index_for_each_sequence(model, mixed, routes):
    ids = mixed[0][:2]
    for ask in (model, model.mixing_weights, partial(model.generate, max_new_tokens=1, **GREEDY)):
        with pytest.raises(MomeError, match="one expert index per sequence, 2 whole numbers here"):
            ask(ids, routes=routes)
    with pytest.raises(MomeError, match="one expert index per sequence, 2 whole numbers here"):
        model.train()(ids, routes=routes)
    model.eval()


def test_generation_wants_weights_for_each_prompt(model, mixed):
    weights = torch.eye(len(LANGUAGES) + 1)[:1]
    with pytest.raises(MomeError, match="2 rows here"):
        model.generate(mixed[0][:2], expert_weights=weights, max_new_tokens=1, **GREEDY)
    text = model.generate(mixed[0][:1], expert_weights=weights, max_new_tokens=1, num_return_sequences=1, **GREEDY)
    assert text.shape == (1, 10)


def test_routes_of_a_shorter_type_are_the_same_routes(model, mixed):
    ids, languages = mixed
    assert torch.equal(model(ids, routes=languages.int()).logits, model(ids, routes=languages).logits)


def test_a_row_of_several_experts_is_not_plain():
    """The answers of a plain batch are copied unweighed, so each row may have one."""
    assert Dispatch.of_weights(torch.tensor([[0.0, 1, 0], [1, 0, 0]])).plain
    assert Dispatch.of_weights(torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5]])).plain
    for weights in ([[1.0, 0.25, 0]], [[0.5, 0.25, 0.5]], [[0.5, 0.5, 0.5]], [[1.0, 0, 0], [0.5, 0, 0.5]]):
        assert not Dispatch.of_weights(torch.tensor(weights)).plain


def test_tokens_outside_the_vocabulary_get_one_sentence(model):
    for strange in (VOCABULARY, -1):
        with pytest.raises(MomeError, match="use the tokenizer of the model"):
            model(torch.tensor([[3, strange]]), routes=torch.tensor([0]))


# ---------------------------------------------------------------------------------------- generate

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": EOS}
HOW = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]


def both_ways(model, ids, mask=None, **options) -> torch.Tensor:
    """The text generated with a cache, after a check that it is the same without."""
    mask = torch.ones_like(ids) if mask is None else mask
    with_cache, without = (
        model.generate(ids, attention_mask=mask, use_cache=use, **GREEDY | options) for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    return with_cache


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("combine", ["mean", "router"])
def test_generation_where_the_router_abstains_agrees_with_and_without_cache(model, mixed, how, combine):
    unknown = unsure(model, mixed)
    model.config.combine = combine
    together = both_ways(model, mixed[0], max_new_tokens=6, **how)
    each = how.get("num_return_sequences", 1)
    for i in range(len(unknown)):
        alone = both_ways(model, mixed[0][i:i + 1], max_new_tokens=6, **how)
        assert torch.equal(together[i * each:(i + 1) * each], alone)


def test_generation_with_all_on_the_common_expert(router, mixed):
    model = build("moe_ce", router)
    text = both_ways(model, mixed[0], routes=torch.full((8,), -1), max_new_tokens=4)
    weights = torch.tensor([[0.0, 0, 0, 0, 1]]).expand(8, -1)
    assert torch.equal(text, both_ways(model, mixed[0], expert_weights=weights, max_new_tokens=4))


def talker(variant, router):
    """A model whose experts write only tokens of one language each: en writes fr, fr writes de and so on.

    So the text of an expert makes the router prefer the next one.
    """
    model = build(variant, router)
    for index, name in enumerate(LANGUAGES):
        head = model.head(name)
        ids = 3 + 12 * ((index + 1) % 4) + torch.arange(12)
        if variant == "ple":
            # The final norm's bias alone decides, and points to the next language's tokens.
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            norm = model.experts[index].transformer.ln_f
        else:
            norm = model.experts[index].ln_f
        head.weight.data[:, index] = 0
        head.weight.data[ids, index] = 5
        norm.bias.data[:] = 0
        norm.bias.data[index] = 40
    return model


@pytest.mark.parametrize("how", HOW[:2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_that_switches_language_changes_its_expert(variant, router, how):
    model = talker(variant, router)
    prompts = torch.cat([tokens(0, 1, 6), tokens(2, 1, 6)])
    options = {"max_new_tokens": 12, **how}
    kept = both_ways(model, prompts, **options)[:, 6:]
    routed = both_ways(model, prompts, reroute_every=4, reroute_window=4, reroute_above=0.3, **options)[:, 6:]
    language = (kept - 3) // 12
    assert torch.equal(language, torch.tensor([[1], [3]]).expand(-1, 12))  # its expert's, all the way
    language = (routed - 3) // 12
    steps = torch.arange(12) // 4
    assert torch.equal(language, (torch.tensor([[1], [3]]) + steps) % 4)  # another expert after every 4 tokens
    never = both_ways(model, prompts, reroute_every=4, reroute_window=4, reroute_above=1.0, **options)[:, 6:]
    assert torch.equal(never, kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rerouting_in_batches_with_padding_and_fallback_is_as_alone(variant, router, mixed):
    model = talker(variant, router)
    unknown = unsure(model, mixed)
    lengths = torch.tensor([9, 4, 6, 9, 3, 7, 5, 8])
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    ids = torch.where(mask.bool(), mixed[0], EOS)
    options = {"max_new_tokens": 9, "reroute_every": 3, "reroute_window": 5, "reroute_above": 0.4}
    together = both_ways(model, ids, mask, **options)
    plain = both_ways(model, ids, mask, max_new_tokens=9)
    assert not torch.equal(together, plain) and unknown.any()
    for i, length in enumerate(lengths):
        alone = both_ways(model, ids[i:i + 1, 9 - length:], **options)
        assert torch.equal(together[i, 9 - length:], alone[0])


def test_wrong_rerouting_gets_one_sentence(router, mixed):
    model = build("jeet", router)
    for options, words in (
        ({"reroute_every": 0}, "reroute_every is a number of tokens"),
        ({"reroute_every": 2, "reroute_window": 0}, "reroute_window is a number"),
        ({"reroute_every": 2, "reroute_above": 1.5}, "reroute_above is a probability"),
    ):
        with pytest.raises(MomeError, match=words):
            model.generate(mixed[0], max_new_tokens=2, **GREEDY, **options)
    with pytest.raises(MomeError, match="lie from 0 to 99 but the model knows 0 to 50"):
        model.generate(torch.tensor([[0, 99]]), routes=torch.tensor([0]), max_new_tokens=2, **GREEDY)
    with pytest.raises(MomeError, match="no fitted router"):
        build("jeet").generate(mixed[0], routes=torch.zeros(8).long(), max_new_tokens=2, reroute_every=1, **GREEDY)


def test_the_text_generation_pipeline_writes_what_generate_writes(model):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        padding_side="left",
    )
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w4 w9 w11 w5", "w40 w44 w41", "w17 w18 w20 w25 w19"]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = [text[0]["generated_token_ids"] for text in writer(prompts, batch_size=3, return_tensors=True, **options)]
    for prompt, written in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], **options)[0].tolist()
        expected = expected[:expected.index(EOS)] if EOS in expected else expected  # the end, which is padding too
        assert [token for token in written if token != EOS] == expected
        assert expected[:len(prompt.split())] == [int(word[1:]) for word in prompt.split()]


def test_a_copy_of_a_model_decides_as_the_model(model, mixed):
    model.set_active(["en", "de"])
    assert torch.equal(copy.deepcopy(model)(mixed[0]).logits, model(mixed[0]).logits)
