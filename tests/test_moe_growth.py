"""Mixtures from finished models; experts come and go, and the others stay as they are to the last bit."""

from __future__ import annotations

import pytest
import torch
from moe_models import BLOCK, LANGUAGES, SHAPE, SIZE, VOCABULARY, build, fitted, mixed_batch, moved, students, tokens
from tokenizers import Tokenizer, models

from mome_utils.config import MomeError, Shape
from mome_utils.models import build_gpt2
from mome_utils.moe import Expert, MomeForCausalLM
from mome_utils.moe_config import VARIANTS
from mome_utils.moe_growth import without_language
from mome_utils.moe_shards import replace_expert
from mome_utils.router_growth import add_language

torch.set_num_threads(1)
OLD = LANGUAGES[:3]


@pytest.fixture(scope="module")
def small():
    return fitted(OLD)


@pytest.fixture(scope="module")
def router():
    return fitted()


@pytest.fixture(scope="module")
def mixed():
    return mixed_batch()


def newcomer(variant):
    """A trained expert, as far as these tests can tell."""
    gpt2 = moved(build_gpt2(SHAPE, seed=7, **SIZE), 7)
    if variant == "ple":
        return gpt2
    return moved(Expert(build(variant).config.gpt2), 7)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("router.")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_is_added_and_the_old_ones_answer_as_before_to_the_last_bit(variant, small, mixed, tmp_path):
    model, ids = build(variant, small, languages=OLD), mixed[0]
    routes = mixed[1].clamp(max=2)
    logits, kept = model(ids, routes=routes).logits, state(model)
    expert = newcomer(variant)
    model.add_expert("py", expert, sequences=tokens(3, 12, BLOCK).numpy())
    assert model.languages == model.active == LANGUAGES and len(model.experts) == 4
    assert torch.equal(model(ids, routes=routes).logits, logits)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    for mine, given in zip(model.experts[3].parameters(), expert.parameters(), strict=True):
        assert torch.equal(mine, given) and mine.data_ptr() != given.data_ptr() and mine.requires_grad
    assert torch.equal(model.router.weight[:3], small.weight) and torch.equal(model.router.bias[:3], small.bias)
    assert torch.equal(model.route(ids), mixed[1])
    model.save_pretrained(tmp_path)
    loaded = MomeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    if variant == "ple":
        assert model.experts[3].lm_head.weight is model.experts[3].transformer.wte.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_is_removed_and_the_others_answer_as_before_to_the_last_bit(variant, router, mixed):
    model, (ids, languages) = build(variant, router), mixed
    kept = languages != 2
    ids, languages = ids[kept], languages[kept]
    moved_down = languages - (languages > 2).long()
    logits = model(ids, routes=languages).logits
    others = [[p.clone() for p in expert.parameters()] for expert in model.experts]
    model.remove_expert("de")
    assert model.languages == ("en", "fr", "py") and len(model.experts) == 3
    assert torch.equal(model(ids, routes=moved_down).logits, logits)
    assert torch.equal(model(ids).logits, logits)  # the router finds the others as before
    for expert, before in zip(model.experts, [others[0], others[1], others[3]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_added_and_removed_again_leaves_the_model_as_it_was(variant, small, mixed):
    model = build(variant, small, languages=OLD)
    before, routes = state(model), model.route(mixed[0])
    model.set_active(["en", "fr"])
    model.add_expert("py", newcomer(variant), router=add_language(small, "py", tokens(3, 12, BLOCK).numpy()))
    assert model.active == ("en", "fr", "py")  # it comes to answer
    model.remove_expert("py")
    assert model.active == ("en", "fr")
    model.set_active(None)
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.route(mixed[0]), routes)
    assert all(torch.equal(a, b) for a, b in zip(model.router.buffers(), small.buffers(), strict=True))


def test_a_router_without_a_language_scores_the_others_as_before(router, mixed):
    smaller = without_language(router, "fr")
    assert smaller.languages == ("en", "de", "py")
    # A product of another size may be added up in another order.
    torch.testing.assert_close(smaller(mixed[0]), router(mixed[0])[:, [0, 2, 3]], atol=1e-12, rtol=0)
    with pytest.raises(MomeError, match="does not know 'it'"):
        without_language(router, "it")


def test_without_a_router_for_it_a_grown_model_needs_routes(small, mixed):
    model = build("jeet", small, languages=OLD)
    model.add_expert("py", newcomer("jeet"))
    with pytest.raises(MomeError, match="no fitted router"):
        model(mixed[0])
    assert model(mixed[0], routes=mixed[1]).logits.shape == (8, 9, VOCABULARY)


def test_blocks_of_a_gpt2_become_an_expert_of_a_joint_mixture(small, tmp_path):
    gpt2 = moved(build_gpt2(SHAPE, seed=7, **SIZE), 7)
    gpt2.save_pretrained(tmp_path)
    for source in (gpt2, tmp_path):
        model = build("moe_ce", small, languages=OLD)
        model.add_expert("py", source)
        own, given = model.experts[3].state_dict(), gpt2.transformer.state_dict()
        assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
        assert given.keys() - own.keys() == {"wte.weight", "wpe.weight"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_that_does_not_fit_changes_nothing(variant, small, router, mixed, tmp_path):
    model = build(variant, small, languages=OLD)
    before, logits, fits = state(model), model(mixed[0]).logits, newcomer(variant)
    for name, expert, options, words in (
        ("fr", fits, {}, "already has an expert 'fr'"), ("common", fits, {}, "already has an expert 'common'"),
        ("py", build_gpt2(Shape(2, 32, 2), seed=0, **SIZE), {}, "'py' differs from the others in shape"),
        ("py", build_gpt2(Shape(2, 16, 4), seed=0, **SIZE), {}, "'py' differs from the others in shape"),
        ("py", torch.nn.Linear(2, 2), {}, "'py' differs from the others"),
        ("py", tmp_path, {}, "is not the folder of a GPT-2"),
        ("py", fits, {"router": small}, "knows en, fr, de and 51 tokens, but the experts would be en, fr, de, py"),
    ):
        with pytest.raises(MomeError, match=words):
            model.add_expert(name, expert, **options)
    with pytest.raises(MomeError, match="no expert 'py' to remove"):
        model.remove_expert("py")
    model.set_active(["de"])
    with pytest.raises(MomeError, match="'de' is the last active expert"):
        model.remove_expert("de")
    model.set_active(None)
    assert model.languages == OLD and all(torch.equal(a, before[name]) for name, a in state(model).items())
    assert torch.equal(model(mixed[0]).logits, logits)
    model.remove_expert("de")
    with pytest.raises(MomeError, match="at least two experts: add one before"):
        model.remove_expert("fr")


def test_the_router_of_the_model_is_not_moved_when_it_learns(small, monkeypatch):
    """On a GPU the router would stay on the processor if learning failed."""
    model = build("jeet", small, languages=OLD)
    moved_routers, cpu = [], type(model.router).cpu
    monkeypatch.setattr(type(model.router), "cpu", lambda self: moved_routers.append(self) or cpu(self))
    with pytest.raises(MomeError):
        model.add_expert("py", newcomer("jeet"), sequences=[[VOCABULARY]])
    assert len(moved_routers) == 1 and moved_routers[0] is not model.router
    assert model.languages == OLD


# ------------------------------------------------------------------------------------- from folders


def tokenizer(words: list[str]) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


def test_a_mixture_is_assembled_from_folders_and_models(router, mixed, tmp_path):
    experts = students()
    words = [f"w{i}" for i in range(VOCABULARY)]
    for name in ("en", "py"):
        experts[name].save_pretrained(tmp_path / name)
        tokenizer(words).save(str(tmp_path / name / "tokenizer.json"))
    expected = MomeForCausalLM.from_experts(experts, router)(mixed[0]).logits
    sources = experts | {"en": tmp_path / "en", "py": str(tmp_path / "py")}
    model = MomeForCausalLM.from_experts(sources, router)
    torch.testing.assert_close(model.eval()(mixed[0]).logits, expected, atol=1e-6, rtol=1e-5)
    tokenizer(words[::-1]).save(str(tmp_path / "py" / "tokenizer.json"))
    with pytest.raises(MomeError, match="'en' and 'py' have different tokenizers"):
        MomeForCausalLM.from_experts(sources, router)
    (tmp_path / "py" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MomeError, match="'py' is not the folder of a GPT-2"):
        MomeForCausalLM.from_experts(experts | {"py": tmp_path / "py"}, router)


def test_an_expert_with_another_tokenizer_is_not_added(mixed, tmp_path):
    experts = students()
    words = [f"w{i}" for i in range(VOCABULARY)]
    for name, vocabulary in (("en", words), ("fr", words), ("de", words[::-1]), ("py", words)):
        experts[name].save_pretrained(tmp_path / name)
        tokenizer(vocabulary).save(str(tmp_path / name / "tokenizer.json"))
    model = MomeForCausalLM.from_experts({name: tmp_path / name for name in ("en", "fr")})
    model.save_pretrained(tmp_path / "model")
    for mixture in (model, MomeForCausalLM.from_pretrained(tmp_path / "model")):
        with pytest.raises(MomeError, match="'de' has another tokenizer than the model"):
            mixture.add_expert("de", tmp_path / "de")
        assert mixture.languages == ("en", "fr")
        mixture.add_expert("py", tmp_path / "py")
    pair = {"en": tmp_path / "de", "fr": tmp_path / "de"}
    MomeForCausalLM.from_experts(pair).save_pretrained(tmp_path / "other")
    for source in (tmp_path / "other", tmp_path / "other" / "expert-en.safetensors"):
        with pytest.raises(MomeError, match="another tokenizer than this mixture"):
            replace_expert(tmp_path / "model", "en", source)
    (tmp_path / "py" / "model.safetensors").rename(tmp_path / "py" / "pytorch_model.bin")
    with pytest.raises(MomeError, match="'py' holds no 'model.safetensors'"):
        MomeForCausalLM.from_experts(experts | {"py": tmp_path / "py"})


def test_settings_of_training_do_not_keep_experts_apart():
    experts = students()
    experts["fr"].config.resid_pdrop = 0.1
    experts["fr"].config.use_cache = False
    assert MomeForCausalLM.from_experts(experts).languages == LANGUAGES
    experts["fr"].config.layer_norm_epsilon = 1e-3  # computes something else
    with pytest.raises(MomeError, match="'en' and 'fr' differ in shape"):
        MomeForCausalLM.from_experts(experts)
