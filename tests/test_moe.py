"""The mixture: mixed batches equal single sequences, only routed experts learn, models travel unchanged."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from moe_models import (
    BLOCK,
    EOS,
    LANGUAGES,
    SHAPE,
    SIZE,
    VOCABULARY,
    build,
    fitted,
    mixed_batch,
    students,
    tokens,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from mome_utils.config import MomeError, Shape
from mome_utils.corpus import Document
from mome_utils.evaluation import score_documents
from mome_utils.moe import MomeForCausalLM, build_mome
from mome_utils.moe_config import COMMON, VARIANTS, MomeConfig
from mome_utils.moe_settings import _normalizers, score_settings, setting_logits, settings
from mome_utils.router_fit import fit_router
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)
@pytest.fixture(scope="module")
def router():
    return fitted()


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, router):
    return build(request.param, router)


@pytest.fixture(scope="module")
def mixed():
    return mixed_batch()


def gradients(model, ids, routes) -> dict[str, torch.Tensor | None]:
    """Gradient of the summed loss of a batch, by parameter."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, VOCABULARY)
    (model(ids, routes=routes).logits * weights).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------ routing


@examples(max_examples=8, deadline=None)
@given(routes=st.lists(st.integers(0, 3), min_size=1, max_size=7))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_equals_one_sequence_at_a_time(variant, routes):
    model = build(variant)
    routes = torch.tensor(routes)
    ids = tokens(0, len(routes), 6, seed=3)
    single = torch.cat([model(ids[i:i + 1], routes=routes[i:i + 1]).logits for i in range(len(ids))])
    torch.testing.assert_close(model(ids, routes=routes).logits, single, atol=1e-5, rtol=1e-5)
    together = gradients(model, ids, routes)
    parts = [gradients(model, ids[i:i + 1], routes[i:i + 1]) for i in range(len(ids))]
    for name, gradient in together.items():
        summed = [part[name] for part in parts if part[name] is not None]
        assert (gradient is None) == (not summed), name
        if gradient is not None:
            torch.testing.assert_close(gradient, sum(summed), atol=1e-5, rtol=1e-4)


def test_the_router_sends_each_sequence_of_a_mixed_batch_to_its_expert(model, mixed):
    ids, languages = mixed
    assert torch.equal(model.route(ids), languages)
    assert torch.equal(model(ids).logits, model(ids, routes=languages).logits)
    for i, language in enumerate(languages):
        hidden = model.expert_hidden(LANGUAGES[language], ids[i:i + 1])
        if model.config.variant == "moe_ce":
            hidden = (hidden + model.expert_hidden(COMMON, ids[i:i + 1])) / 2
        expected = model.head(LANGUAGES[language])(hidden)
        torch.testing.assert_close(model(ids).logits[i:i + 1], expected, atol=1e-5, rtol=1e-5)


def test_the_common_expert_can_be_left_out(router, mixed):
    ids, languages = mixed
    model = build("moe_ce", router)
    jeet = MomeForCausalLM(MomeConfig(**{**model.config.to_dict(), "variant": "jeet"})).eval()
    jeet.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("common.")})
    torch.testing.assert_close(model(ids, use_common=False).logits, jeet(ids, routes=languages).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_that_were_not_routed_stay_the_same_to_the_bit(variant):
    model = build(variant).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step, route in enumerate([1, 3, 1]):
        idle = {name: tensor.clone() for name, tensor in model.state_dict().items() if f"experts.{route}." not in name}
        ids = tokens(route, 4, 8, seed=step)
        model(ids, routes=torch.full((4,), route), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # Expert 3 has learned in the second step, so the optimizer holds its moments; the third step leaves it alone.
    third = {name for name in idle if name.startswith("experts.3.")}
    assert third and all(torch.equal(model.state_dict()[name], idle[name]) for name in third)
    frozen = {name for name in before if name.startswith(("experts.0.", "experts.2.", "router."))}
    assert not changed & frozen
    used = ("experts.1.", "experts.3.", "common.", "lm_head")
    assert {name for name in before if name.startswith(used)} <= changed


def test_loss_is_shifted_and_ignores_masked_labels(model, mixed):
    ids, languages = mixed
    labels = ids.clone()
    labels[:, 5] = -100
    output = model(ids, routes=languages, labels=labels)
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    kept = [0, 1, 2, 3, 5, 6, 7]  # the position before place 5 predicts it
    torch.testing.assert_close(output.loss, -logprobs[:, kept].mean())


# ------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_gives_equal_logits_and_holds_everything(variant, router, mixed, tmp_path):
    model = build(variant, router)
    model.save_pretrained(tmp_path)
    shards = {f"expert-{name}.safetensors" for name in LANGUAGES} | {"shared.safetensors"}
    others = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {f.name for f in tmp_path.iterdir()} == shards | others  # no pickles, no code
    with safe_open(tmp_path / "shared.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"router.idf", "router.weight", "router.bias"} <= names
    assert not any(name.startswith("experts.") for name in names)
    assert ("lm_head.weight" in names) == (variant != "ple")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MomeForCausalLM) and loaded.languages == LANGUAGES
    assert AutoConfig.from_pretrained(tmp_path).variant == variant
    assert torch.equal(loaded(mixed[0]).logits, model(mixed[0]).logits)
    assert loaded.router.weight.dtype == torch.float64
    assert torch.equal(loaded.router.weight, model.router.weight)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(mixed[0]).logits, model(mixed[0]).logits, atol=1e-5, rtol=1e-5)


def test_a_loaded_model_keeps_that_its_router_was_never_fitted(tmp_path):
    build("jeet").save_pretrained(tmp_path)
    loaded = MomeForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(MomeError, match="no fitted router"):
        loaded(tokens(0, 1, 4))
    assert json.loads((tmp_path / "config.json").read_text())["router_fitted"] is False


def test_experts_from_students_answer_as_the_students(router, mixed, tmp_path):
    experts = students()
    model = MomeForCausalLM.from_experts(experts, router)
    ids, languages = mixed
    logits = model(ids).logits
    for i, language in enumerate(languages):
        own = experts[LANGUAGES[language]](ids[i:i + 1]).logits
        torch.testing.assert_close(logits[i:i + 1], own, atol=1e-6, rtol=1e-5)
    for index, student in enumerate(experts.values()):
        expert = model.experts[index]
        assert expert.lm_head.weight is expert.transformer.wte.weight  # still tied, as in the student
        assert expert.lm_head.weight.data_ptr() != student.lm_head.weight.data_ptr()
    model.save_pretrained(tmp_path)
    assert torch.equal(MomeForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)


def test_parameter_counts():
    model = build("moe_ce")
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for expert in model.experts[1:] for p in expert.parameters())
    assert counts["active"] == counts["total"] - idle
    ple = MomeForCausalLM.from_experts(students())
    assert ple.parameter_counts()["active"] == sum(p.numel() for p in students()["en"].parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_weights_and_the_global_generator_is_left_alone(variant):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_mome(variant, SHAPE, languages=LANGUAGES, seed=1, **SIZE)
    assert torch.equal(torch.rand(3), expected)
    second = build_mome(variant, SHAPE, languages=LANGUAGES, seed=1, **SIZE)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.experts[0].parameters()), next(build(variant).experts[0].parameters()))


# ------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_with_a_cache_agrees_with_generation_without(model, mixed, how):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": False} | how
        texts.append(model.generate(
            mixed[0], attention_mask=torch.ones_like(mixed[0]), max_new_tokens=8, use_cache=use_cache,
            eos_token_id=None, **options,
        ))
    assert torch.equal(*texts)
    assert texts[0].shape[1] == mixed[0].shape[1] + 8


def test_generation_keeps_the_route_of_the_prompt(model, mixed):
    ids, languages = mixed
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    greedy["attention_mask"] = torch.ones_like(ids)
    text = model.generate(ids, **greedy)
    assert torch.equal(text, model.generate(ids, routes=languages, **greedy))
    other = model.generate(ids, routes=(languages + 1) % 4, **greedy)
    assert not torch.equal(text, other)


def test_left_padded_prompts_generate_as_they_do_alone(model, mixed):
    ids = mixed[0]
    lengths = torch.tensor([9, 4, 6, 9, 3, 7, 5, 8])
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    padded = torch.where(mask.bool(), ids, EOS)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    for i, length in enumerate(lengths):
        prompt = ids[i:i + 1, 9 - length:]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[i, 9 - length:], alone[0])


def test_padding_on_either_side_changes_no_logits(model, mixed):
    ids, languages = mixed
    plain = model(ids, routes=languages).logits
    pad = torch.full((len(ids), 3), EOS)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pad)
    left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([zeros, ones], 1)).logits[:, 3:]
    right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :-3]
    torch.testing.assert_close(left, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right, plain, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ settings


def test_the_published_settings():
    def names(variant, languages=LANGUAGES):
        return [s.name for s in settings(MomeConfig(variant=variant, languages=languages))]

    assert [len(names(variant)) for variant in VARIANTS] == [12, 12, 21]
    assert len(set(names("moe_ce"))) == 21 and set(names("jeet")) < set(names("moe_ce"))
    assert {"routed, with common", "common alone", "fr+py averaged", "all averaged"} <= set(names("moe_ce"))
    assert names("ple") == names("jeet")
    assert len(names("moe_ce", ("xx", "yy"))) == 8  # two languages: no pair but all of them
    assert {"a+c routed", "b+c averaged"} <= set(names("jeet", ("a", "b", "c")))


def test_setting_logits_equal_the_forward_pass(model, mixed):
    ids, languages = mixed
    names = (*LANGUAGES, COMMON) if model.config.variant == "moe_ce" else LANGUAGES
    experts = {name: model.head(name)(model.expert_hidden(name, ids)) for name in names}
    found = {s.name: s for s in settings(model.config)}
    for use_common in (False, True)[: 1 + (COMMON in names)]:
        setting = found["routed, with common" if use_common else "routed"]
        combined = setting_logits(experts, setting, languages)
        expected = model(ids, routes=languages, use_common=use_common).logits
        torch.testing.assert_close(combined, expected, atol=1e-5, rtol=1e-5)
    averaged = setting_logits(experts, found["all averaged"])
    if model.config.variant == "ple":
        mean = torch.stack([experts[name].log_softmax(-1) for name in LANGUAGES]).mean(0)
        torch.testing.assert_close(averaged.log_softmax(-1), mean.log_softmax(-1), atol=1e-5, rtol=1e-5)
    else:
        hidden = torch.stack([model.expert_hidden(name, ids) for name in LANGUAGES]).mean(0)
        torch.testing.assert_close(averaged, model.lm_head(hidden), atol=1e-5, rtol=1e-5)
    with pytest.raises(MomeError, match="needs a route"):
        setting_logits(experts, found["routed"])


@examples(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 60.0), seed=st.integers(0, 1000))
def test_normalizers_of_groups_are_those_of_double_precision(scale, seed):
    logits = scale * torch.randn(5, 4, 30, generator=torch.Generator().manual_seed(seed))
    groups = [[0], [3], [0, 2], [2, 3], [0, 1, 2, 3]]
    exact = torch.stack([logits.double()[:, g].mean(1).logsumexp(-1) for g in groups])
    torch.testing.assert_close(_normalizers(logits, groups).double(), exact, atol=1e-4, rtol=1e-5)


SENTENCES = {
    "en": "The road along the river is quiet, and the old mill stands by the bridge. ",
    "fr": "La route qui longe la rivière est calme, et le vieux moulin se dresse près du pont. ",
    "de": "Die Straße am Fluss ist ruhig, und die alte Mühle steht bei der Brücke. ",
    "py": "def mill(river):\n    return [stone for stone in river if stone.old]\n",
}


@pytest.fixture(scope="module")
def documents():
    return [
        Document(id=f"{name}{i}", language=name, group="g", title="", text=text * (i + 1))
        for i in range(2) for name, text in SENTENCES.items()
    ]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer([d.text for d in documents], 300)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_settings_equal_scores_of_the_model(variant, documents, tokenizer):
    model = build_mome(
        variant, SHAPE, languages=LANGUAGES, seed=2, vocab_size=len(tokenizer), block_size=32,
        bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.set_router(fit_router(
        {d.language: [tokenizer(d.text)["input_ids"]] for d in documents[4:]}, len(tokenizer)
    ))
    windows = {"block_size": 32, "stride": 8, "batch_size": 5}
    rows = score_settings(model, tokenizer, documents, **windows).set_index("setting")
    assert set(rows.index) == {s.name for s in settings(model.config, oracle=True)}

    def expect(name, of_documents, **options):
        def logits(ids):
            options_ = {k: torch.full((len(ids),), v) if k == "routes" else v for k, v in options.items()}
            return model(ids, **options_).logits

        expected = score_documents(logits, tokenizer, of_documents, **windows)
        found = rows.loc[name]
        found = found[found["document"].isin([d.id for d in of_documents])].reset_index(drop=True)
        assert (found[["language", "document", "bytes", "tokens"]] == expected.drop(columns="nats")).all(None)
        assert found["nats"].to_numpy() == pytest.approx(expected["nats"].to_numpy(), rel=1e-5)

    for index, language in enumerate(LANGUAGES):
        own = [d for d in documents if d.language == language]
        expect(f"{language} alone", documents, routes=index, use_common=False)
        expect("routed, true language", own, routes=index, use_common=False)
        if variant == "moe_ce":
            expect(f"{language} alone, with common", documents, routes=index)
            expect("routed, with common, true language", own, routes=index)
    # The router knows these texts, so that its choice and the truth give the same numbers.
    assert rows.loc["routed", "nats"].tolist() == rows.loc["routed, true language", "nats"].tolist()
    pair = rows.loc["fr+py routed"]
    of_python = pair["language"] == "py"
    assert pair["nats"][of_python].tolist() == rows.loc["py alone"]["nats"][of_python.to_numpy()].tolist()


# ------------------------------------------------------------------------------------------ bad input


def test_bad_input_gets_one_clear_sentence(router, documents, tokenizer):
    model = build("moe_ce")
    with pytest.raises(MomeError, match="no MoE variant 'moe'"):
        MomeConfig(variant="moe")
    for languages in (["en"], ["en", "en"], ["en", "common"]):
        with pytest.raises(MomeError, match="at least two languages"):
            MomeConfig(languages=languages)
    with pytest.raises(MomeError, match="knows en, fr, de, py but the experts are fr, en"):
        MomeForCausalLM.from_experts(students(("fr", "en")), router)
    with pytest.raises(MomeError, match="vocabulary of 51 tokens"):
        model.set_router(fit_router({name: tokens(i, 2, 5).numpy() for i, name in enumerate(LANGUAGES)}, 99))
    with pytest.raises(MomeError, match="'en' and 'py' differ in shape"):
        MomeForCausalLM.from_experts(students(("en",)) | students(("py",), Shape(1, 16, 2)))
    with pytest.raises(MomeError, match="needs at least two"):
        MomeForCausalLM.from_experts({})
    with pytest.raises(MomeError, match="no fitted router"):
        model(tokens(0, 2, 4))
    with pytest.raises(MomeError, match="from 0 to 3, but lie from 1 to 4"):
        model(tokens(0, 2, 4), routes=torch.tensor([1, 4]))
    with pytest.raises(MomeError, match="has 25 tokens but the model's context holds 24"):
        model(tokens(0, 1, 25), routes=torch.tensor([0]))
    with pytest.raises(MomeError, match="no expert 'it'"):
        model.expert_hidden("it", tokens(0, 1, 4))
    windows = {"block_size": BLOCK, "stride": 8}
    with pytest.raises(MomeError, match="no fitted router"):
        score_settings(model, tokenizer, documents, **windows)
    other = fit_router({"en": [[3, 4]], "it": [[5, 6]]}, VOCABULARY)
    with pytest.raises(MomeError, match="knows en, it but the experts"):
        score_settings(model, tokenizer, documents, router=other, **windows)
    foreign = [Document(id="x", language="it", group="", title="", text="ciao")]
    with pytest.raises(MomeError, match="No expert knows it"):
        score_settings(model, tokenizer, foreign, router=router, **windows)
