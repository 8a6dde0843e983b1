"""Looks into a mixture: token losses, texts that switch their language, short prompts, and their figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils import figures_moe, moe_views
from mome_utils.config import MomeError, Shape
from mome_utils.moe import build_mome
from mome_utils.moe_settings import setting_logits, setting_weights, settings
from mome_utils.router_fit import fit_router
from mome_utils.tokenization import train_tokenizer

torch.set_num_threads(1)
LANGUAGES = ("en", "fr", "de")
BLOCK, RANGE = 24, 12


def tokens(language: int, count: int) -> np.ndarray:
    """Sequences [count, BLOCK] of ids that belong to one language."""
    return 3 + RANGE * language + np.random.default_rng(language).integers(RANGE, size=(count, BLOCK))


@pytest.fixture(scope="module")
def blocks():
    return {g: tokens(i, 10) for i, g in enumerate(LANGUAGES)}


@pytest.fixture(scope="module", params=["ple", "jeet", "moe_ce"])
def model(request, blocks):
    vocabulary = 3 + RANGE * len(LANGUAGES)
    found = build_mome(request.param, Shape(1, 16, 2), vocab_size=vocabulary, block_size=BLOCK, languages=LANGUAGES,
                       seed=0, bos=1, eos=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    found.set_router(fit_router(blocks, vocabulary))
    return found.eval()


def test_a_setting_is_a_row_of_weights_of_the_model(model, blocks):
    ids = torch.from_numpy(np.concatenate([b[:2] for b in blocks.values()]))
    with torch.inference_mode():
        names = [*LANGUAGES, *(["common"] if model.common is not None else [])]
        logits = {name: model.head(name if name in LANGUAGES else "en")(model.expert_hidden(name, ids))
                  for name in names}
        for setting in settings(model.config):
            routes = torch.arange(len(ids)) % max(1, len(setting.experts))
            weights = setting_weights(LANGUAGES, setting, routes)
            torch.testing.assert_close(weights.sum(1), torch.ones(len(ids)))
            ours = model(ids, expert_weights=weights).logits.log_softmax(-1)
            known = setting_logits(logits, setting, routes if setting.routed else None).log_softmax(-1)
            torch.testing.assert_close(ours, known, atol=1e-4, rtol=1e-4)


def test_a_switching_document_has_equal_shares_in_order(blocks):
    ids, languages = moe_views.switching_document(blocks, BLOCK)
    assert languages == ["en"] * 8 + ["fr"] * 8 + ["de"] * 8
    assert torch.equal((ids - 3) // RANGE, torch.arange(3).repeat_interleave(8))
    with pytest.raises(MomeError, match="cannot hold 3 languages"):
        moe_views.switching_document(blocks, 2)


def test_token_losses_are_the_models_and_windows_follow_the_text(model, blocks):
    ids, languages = moe_views.switching_document(blocks, BLOCK)
    rows, chosen = moe_views.token_losses(model, ids, every=4, window=4)
    wide = rows.pivot(index="position", columns="voice", values="nats")
    assert list(wide.index) == list(range(1, BLOCK)) and len(chosen) == BLOCK - 1
    with torch.inference_mode():
        for i, g in enumerate(LANGUAGES):
            loss = model(ids[None], routes=torch.tensor([i]), labels=ids[None]).loss
            assert wide[g].mean() == pytest.approx(loss.item(), rel=1e-4)
    once = LANGUAGES[int(model.route(ids[None])[0])]
    np.testing.assert_array_equal(wide[moe_views.DOCUMENT], wide[once])
    np.testing.assert_array_equal(wide[moe_views.WINDOWS], [wide.loc[p, g] for p, g in zip(wide.index, chosen,
                                                                                           strict=True)])
    # Ranges of ids tell languages apart, so a decision names the language of the tokens before its window.
    assert chosen == [languages[max(0, position // 4 * 4 - 1)] for position in wide.index]


def test_prompt_losses_are_those_of_the_model_that_abstains(model, blocks):
    rows = moe_views.prompt_losses(model, blocks, 3)
    assert rows["right"].all() and len(rows) == sum(map(len, blocks.values()))
    ids = torch.from_numpy(blocks["fr"][:1])
    with torch.inference_mode():
        routed = model(ids, routes=torch.tensor([1])).logits[0, 2:-1].log_softmax(-1)
    nats = -routed.gather(1, ids[0, 3:, None]).mean().item()
    assert rows[rows["language"] == "fr"]["routed"].iloc[0] == pytest.approx(nats, rel=1e-5)
    if model.common is not None:
        alone = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        with torch.inference_mode():
            common = model(ids, expert_weights=alone).logits[0, 2:-1].log_softmax(-1)
        expected = -common.gather(1, ids[0, 3:, None]).mean().item()
        assert rows[rows["language"] == "fr"]["fallback"].iloc[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(MomeError, match="leaves nothing"):
        moe_views.prompt_losses(model, blocks, BLOCK)


def test_misrouted_blocks_are_those_of_another_language_and_have_both_losses(model, blocks):
    assert moe_views.misrouted_losses(model, blocks).empty
    strangers = {"en": np.concatenate([blocks["en"][:2], blocks["de"][:3]]), "fr": blocks["fr"]}
    rows = moe_views.misrouted_losses(model, strangers)
    assert rows["language"].tolist() == ["en"] * 3 and rows["expert"].tolist() == ["de"] * 3
    ids = torch.from_numpy(blocks["de"][:3])
    with torch.inference_mode():
        losses = {name: [model(one[None], routes=torch.tensor([i]), labels=one[None]).loss.item() for one in ids]
                  for name, i in (("routed", 2), ("right", 0))}
    for name, expected in losses.items():
        np.testing.assert_allclose(rows[name], expected, rtol=1e-4)


def test_coverage_falls_with_the_threshold_and_its_ends_are_known():
    rows = pd.DataFrame({"length": 8, "probability": [0.4, 0.6, 0.8, 0.9], "right": [False, True, True, True],
                         "routed": [4.0, 2.0, 2.0, 2.0], "fallback": 3.0})
    curve = moe_views.coverage_curve(rows, [0.0, 0.5, 0.85, 1.0])
    assert curve["coverage"].tolist() == [1.0, 0.75, 0.25, 0.0]
    assert curve["nats"].tolist() == [2.5, 2.25, 2.75, 3.0]
    assert curve["right"].tolist()[:3] == [0.75, 1.0, 1.0] and np.isnan(curve["right"].iloc[-1])


@pytest.fixture(scope="module")
def speaking():
    texts = ["the cat sat on a mat " * 4, "le chat est sur une natte " * 4]
    tokenizer = train_tokenizer(texts, 280)
    model = build_mome("moe_ce", Shape(1, 16, 2), vocab_size=len(tokenizer), block_size=BLOCK,
                       languages=("en", "fr"), seed=0, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    model.set_router(fit_router({g: [tokenizer(t)["input_ids"]] for g, t in zip(("en", "fr"), texts, strict=True)},
                                len(tokenizer)))
    return model.eval(), tokenizer


def test_every_voice_continues_the_prompt_and_alike_each_time(speaking):
    model, tokenizer = speaking
    title, prompt, written = moe_views.prompt_panel(model, "MoE", tokenizer, "the cat", max_new_tokens=6)
    assert title == "MoE, routed to en" and prompt == "the cat"
    assert list(written) == ["en alone", "fr alone", "common alone", "MoE"]
    assert moe_views.prompt_panel(model, "MoE", tokenizer, "the cat", max_new_tokens=6)[2] == written
    greedy = moe_views.continuations({"MoE": moe_views.Voice(model)}, tokenizer, "the cat", max_new_tokens=6,
                                     temperature=0)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("the cat")["input_ids"]]])
    for _ in range(6):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids, routes=torch.tensor([0])).logits[:, -1:].argmax(-1)], 1)
    assert greedy["MoE"] == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    for bad, message in (({"prompt": ""}, "prompt is empty"), ({"max_new_tokens": BLOCK}, "no room")):
        options = {"prompt": "the cat", "max_new_tokens": 6} | bad
        with pytest.raises(MomeError, match=message):
            moe_views.continuations({"MoE": moe_views.Voice(model)}, tokenizer, **options)


# --- figures


def test_text_panels_show_every_text():
    figure = figures_moe.text_panels([("One", "a prompt", {"ple": "line\nbreak", "other": ""})])
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["prompt", "a prompt", "PLE", "line ⏎ break", "other", "(nothing)"]
    with pytest.raises(MomeError, match="a voice or more"):
        figures_moe.text_panels([("One", "a prompt", {})])


def test_the_strip_shows_language_best_and_chosen():
    rows = pd.DataFrame([{"position": p, "voice": v, "nats": n} for p in range(1, 5)
                         for v, n in (("en", 1.0 + (p > 2)), ("fr", 2.0 - (p > 2)), ("both", 1.0))])
    languages = ["en", "en", "fr", "fr"]
    figure = figures_moe.switching_losses(rows, languages, ["en", "en", "en", "fr"], ["en", "fr", "both"], smooth=1)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["English"].get_ydata().tolist() == [1, 1, 2, 2]
    pictures = [image.get_array().tolist() for image in figure.axes[1].images]
    assert pictures[0] == pictures[1] and pictures[0] != pictures[2]
    with pytest.raises(MomeError, match="one loss per position"):
        figures_moe.switching_losses(rows, languages[:2], languages[:2], ["en"])


def test_coverage_curves_have_a_panel_each_and_mark_the_threshold():
    rows = pd.DataFrame([{"panel": p, "length": n, "threshold": t, "coverage": 1 - t, "nats": 2 + t}
                         for p in ("ple", "jeet") for n in (8, 16) for t in (0.0, 0.5, 1.0)])
    figure = figures_moe.coverage_curves(rows, "Nats", marked=0.5)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["PLE", "JEET"]
    marked = [line.get_xydata().tolist() for line in figure.axes[0].lines if len(line.get_xydata()) == 1]
    assert marked == [[[0.5, 2.5]]] * 2
