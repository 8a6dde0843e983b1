"""Models that differ in how they encode position: identities, and what depends on what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mome_utils.config import MomeError, Shape
from mome_utils.models import IGNORED, build_gpt2
from mome_utils.position_models import (
    BUCKETS,
    POSITIONS,
    PositionForPretraining,
    PositionForTokenClassification,
    build_position_model,
    classifier_from,
    distance_bucket,
    load_classifier,
)

SHAPE = Shape(2, 16, 2)
both = pytest.mark.parametrize("causal", [False, True])
each = pytest.mark.parametrize("position", POSITIONS)


def model_of(position: str, causal: bool, seed: int = 0) -> PositionForPretraining:
    return build_position_model(
        position, SHAPE, causal=causal, vocab_size=40, max_positions=64, seed=seed
    ).eval().double()


def ids_of(length: int = 9, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@both
@each
def test_moving_a_whole_sequence_changes_nothing_unless_positions_are_absolute(position: str, causal: bool) -> None:
    body, ids = model_of(position, causal).body, ids_of()
    places = torch.arange(9)[None].expand(2, 9)
    here, there = (body(ids, position_ids=places + k).last_hidden_state for k in (0, 50))
    if position == "absolute":
        assert (here - there).abs().max() > 1e-3
    else:
        assert torch.allclose(here, there, atol=1e-12)


@both
@each
def test_shifted_positions_are_what_moving_the_text_by_hand_gives(position: str, causal: bool) -> None:
    """The text moved behind unseen padding stands where shifted position ids say it stands."""
    body, ids, shift = model_of(position, causal).body, ids_of(), 20
    pad = torch.zeros(2, shift, dtype=torch.long)
    moved = torch.cat([ids[:, :1], pad, ids[:, 1:]], 1)  # the first special token stays
    mask = torch.cat([torch.ones(2, 1), torch.zeros(2, shift), torch.ones(2, 8)], 1).long()
    by_hand = body(moved, attention_mask=mask).last_hidden_state[:, shift + 1 :]
    places = torch.tensor([[0, *range(1 + shift, 9 + shift)]]).expand(2, 9)
    assert torch.allclose(by_hand, body(ids, position_ids=places).last_hidden_state[:, 1:], atol=1e-12)


@each
def test_a_decoder_sees_nothing_that_comes_later_and_an_encoder_does(position: str) -> None:
    ids, other = ids_of(), ids_of()
    other[:, -1] = 3 + (other[:, -1] - 2) % 37
    for causal in (True, False):
        body = model_of(position, causal).body
        same = torch.allclose(body(ids).last_hidden_state[:, :-1], body(other).last_hidden_state[:, :-1], atol=1e-12)
        assert same == causal


@both
@each
def test_padding_is_not_seen(position: str, causal: bool) -> None:
    body, ids = model_of(position, causal).body, ids_of()
    padded, mask = torch.cat([ids, ids[:, :4]], 1), torch.tensor([[1] * 9 + [0] * 4] * 2)
    assert torch.allclose(body(ids).last_hidden_state, body(padded, attention_mask=mask).last_hidden_state[:, :9],
                          atol=1e-12)


@each
def test_order_matters(position: str) -> None:
    body, ids = model_of(position, False).body, ids_of()
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    mixed = body(ids[:, order]).last_hidden_state[:, order.argsort()]
    assert (body(ids).last_hidden_state - mixed).abs().max() > 1e-4


def test_what_models_share_starts_alike() -> None:
    parts = [dict(model_of(p, c).named_parameters()) for p in POSITIONS for c in (False, True)]
    common = set.intersection(*(set(own) for own in parts))
    assert {name.split(".")[1] for own in parts for name in set(own) - common} == {"places", "distances"}
    assert all(torch.equal(own[name], parts[0][name]) for own in parts for name in common)
    assert not torch.equal(model_of("rotary", False, 1).body.tokens.weight, parts[0]["body.tokens.weight"])


def test_buckets_are_exact_when_near_and_coarse_when_far() -> None:
    distance = torch.arange(-200, 201)
    bucket = distance_bucket(distance, causal=False)
    assert bucket.min() == 0 and bucket.max() == BUCKETS - 1
    near = {int(d): int(b) for d, b in zip(distance, bucket, strict=True) if abs(d) < BUCKETS // 4}
    assert len(set(near.values())) == len(near)
    assert set(bucket[distance > 0].tolist()).isdisjoint(bucket[distance <= 0].tolist())
    assert (bucket[distance > 0].diff() >= 0).all() and (bucket[distance <= 0].diff() <= 0).all()
    one_way = distance_bucket(distance, causal=True)
    assert (one_way[distance >= 0] == 0).all() and one_way[0] == BUCKETS - 1


def test_alibi_takes_off_what_press_et_al_say() -> None:
    model = model_of("alibi", True).body
    bias = model._bias(torch.arange(4)[None], None, 4)
    assert bias[0, :, 3, :].tolist() == [[-s * d for d in (3, 2, 1, 0)] for s in (2.0**-4, 2.0**-8)]
    assert bias[0, 0, 0, 1] < -1e30


def test_loss_of_pretraining_is_over_the_labelled_positions() -> None:
    model, ids = model_of("rotary", False), ids_of()
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3], labels[1, 5] = 7, 8
    out = model(ids, labels)
    log_p = (model.body(ids).last_hidden_state @ model.body.tokens.weight.T).log_softmax(-1)
    assert out.logits.shape == (2, 40)
    assert out.loss.item() == pytest.approx(-(log_p[0, 3, 7] + log_p[1, 5, 8]).item() / 2)


def test_a_language_model_gets_a_head_and_comes_back_from_disk(tmp_path: Path) -> None:
    models = {"ours": model_of("rotary", True).float(),
              "gpt2": build_gpt2(SHAPE, vocab_size=40, block_size=64, seed=0, bos=1, eos=2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        first, again, other = (classifier_from(tmp_path / name, 5, seed).eval() for seed in (0, 0, 1))
        assert first(ids_of()).logits.shape == (2, 9, 5)
        assert torch.equal(first(ids_of()).logits, again(ids_of()).logits)
        assert not torch.equal(first(ids_of()).logits, other(ids_of()).logits)
        first.save_pretrained(tmp_path / "done")
        assert torch.equal(load_classifier(tmp_path / "done")(ids_of()).logits, first(ids_of()).logits)
        base, own = (dict(m.base_model.named_parameters()) for m in (model, first))
        assert base.keys() == own.keys() and all(torch.equal(base[n], own[n]) for n in base)


def test_loss_of_classification_and_attention_weights() -> None:
    model = model_of("absolute", False)
    config = model.config
    config.num_labels = 3
    head = PositionForTokenClassification(config).double().eval()
    labels = torch.full((2, 9), IGNORED)
    labels[0, 2] = 1
    out = head(ids_of(), labels=labels, output_attentions=True)
    assert out.loss.item() == pytest.approx(-out.logits[0, 2].log_softmax(-1)[1].item())
    assert len(out.attentions) == 2 and torch.allclose(out.attentions[0].sum(-1), torch.ones(2, 2, 9).double())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MomeError, match="no position encoding 'sinus'"):
        model_of("sinus", False)
    with pytest.raises(MomeError, match="even width"):
        build_position_model("rotary", Shape(1, 6, 2), causal=False, vocab_size=9, max_positions=9, seed=0)
    with pytest.raises(MomeError, match="Position 64 does not exist"):
        model_of("absolute", False).body(ids_of(), position_ids=torch.arange(56, 65)[None])
