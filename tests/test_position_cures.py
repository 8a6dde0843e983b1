"""RPS, CP and their controls as collators: what they keep, what they cover, and that any Trainer takes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import Trainer, TrainingArguments

from mome_utils.config import MomeError, Shape
from mome_utils.models import IGNORED
from mome_utils.position_cures import (
    CURES,
    BatchesTwice,
    ContextPerturbation,
    LeftPadding,
    PlainCollator,
    RandomPositionShift,
    TwoSteps,
    make_collator,
)
from mome_utils.position_models import build_position_model, classifier_from

PAD, ROOM = 2, 24


def examples(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Sequences after a special token 1; every other token is one of a kind, and its label says which it is."""
    made, reached = [], 100
    for length in lengths:
        own = list(range(reached, reached + length))
        reached += length
        made.append({"input_ids": [1, *own], "labels": [IGNORED, *[token + 1000 for token in own]]})
    return made


lengths = st.lists(st.integers(1, ROOM - 1), min_size=1, max_size=8)
few = settings(max_examples=40, deadline=None, derandomize=True)


def rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def check_masks_and_labels(batch: dict[str, torch.Tensor]) -> None:
    """Padding is masked and unlabelled, nothing else is masked, and a token's label is its own."""
    seen = batch["attention_mask"].bool()
    assert (batch["input_ids"][~seen] == PAD).all() and (batch["input_ids"][seen] != PAD).all()
    assert (batch["labels"][~seen] == IGNORED).all()
    words = batch["input_ids"] >= 100
    assert (batch["labels"][words] == batch["input_ids"][words] + 1000).all()
    assert (batch["labels"][~words] == IGNORED).all()
    assert batch["position_ids"].min() >= 0 and batch["position_ids"].max() < ROOM


@few
@given(lengths, st.integers(0, 5))
def test_rps_keeps_order_and_length_and_stays_within_the_models_positions(sizes: list[int], seed: int) -> None:
    made = RandomPositionShift(PAD, ROOM, seed)(examples(sizes))
    check_masks_and_labels(made)
    assert rows(made) == [e["input_ids"] for e in examples(sizes)]
    for places, mask in zip(made["position_ids"], made["attention_mask"], strict=True):
        own = places[mask.bool()]
        assert own[0] == 0  # the special token stays
        assert (own[1:].diff() == 1).all() and own[1] >= 1


def test_rps_covers_offsets_uniformly() -> None:
    collate, size = RandomPositionShift(PAD, ROOM, 0), 5
    batch = examples([size] * 50)
    first = [int(p) for _ in range(80) for p in collate(batch)["position_ids"][:, 1]]
    counts = Counter(first)
    assert set(counts) == set(range(1, ROOM - size + 1))  # every offset that fits, and no other
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_rps_without_anchors_moves_everything() -> None:
    made = RandomPositionShift(PAD, ROOM, 3, anchors=0)(examples([6] * 20))
    assert (made["position_ids"].diff(dim=1) == 1).all()
    assert len(set(made["position_ids"][:, 0].tolist())) > 5


@few
@given(lengths, st.integers(0, 5), st.integers(1, 3))
def test_cp_keeps_every_token_once_per_permutation_with_its_label(sizes: list[int], seed: int, times: int) -> None:
    given_, made = examples(sizes), ContextPerturbation(PAD, ROOM, seed, times)(examples(sizes))
    check_masks_and_labels(made)
    assert made["input_ids"].shape[1] <= ROOM
    packed = rows(made)
    tokens = Counter(token for row in packed for token in row[1:])
    assert tokens == Counter({token: times for e in given_ for token in e["input_ids"][1:]})
    assert all(row[0] == 1 for row in packed)  # one special token, at the begin
    for e in given_:  # a sequence stays whole and in order
        whole = ",".join(map(str, e["input_ids"][1:]))
        assert sum(f",{whole}," in f",{','.join(map(str, row))}," for row in packed) == times
    assert (made["position_ids"] == torch.arange(made["input_ids"].shape[1])).all()


def test_cp_packs_as_much_as_fits_in_orders_that_differ() -> None:
    made = ContextPerturbation(PAD, ROOM, 0, permutations=20)(examples([7] * 6))
    assert len(made["input_ids"]) == 20 * 2  # 1 + 3 · 7 tokens in a row
    firsts = {row[1] for row in rows(made)}
    assert len(firsts) == 6


@few
@given(lengths, st.integers(0, 5))
def test_left_padding_moves_whole_sequences_behind_padding(sizes: list[int], seed: int) -> None:
    made = LeftPadding(PAD, ROOM, seed)(examples(sizes))
    check_masks_and_labels(made)
    assert rows(made) == [e["input_ids"] for e in examples(sizes)]
    assert (made["position_ids"].diff(dim=1) == 1).all()


@pytest.mark.parametrize("name", CURES)
def test_the_same_seed_gives_the_same_batches(name: str) -> None:
    batch = examples([3, 9, 4, 12, 5])

    def course(seed: int) -> list[dict[str, torch.Tensor]]:
        collate = make_collator(name, pad=PAD, max_positions=ROOM, seed=seed)
        return [collate(batch) for _ in range(4)]

    first, again, other = course(1), course(1), course(2)
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(first, again, strict=True)]
    assert all(same)
    if name != "plain":
        text = ["".join(str(b[k].tolist()) for b in c for k in sorted(b)) for c in (first, other)]
        assert text[0] != text[1]
        assert str(first[0]) != str(first[1])  # and each batch is drawn anew


def test_two_steps_on_every_batch() -> None:
    collate = TwoSteps(PlainCollator(PAD), LeftPadding(PAD, ROOM, 0))
    batch = examples([5, 5])
    made = [collate(batch) for _ in range(4)]
    plain = PlainCollator(PAD)(batch)["input_ids"]
    assert [torch.equal(m["input_ids"], plain) for m in made] == [True, False, True, False]


def test_batches_come_twice_in_a_row_and_cover_each_pass() -> None:
    order = list(BatchesTwice(11, 3, passes=2, seed=0))
    assert len(order) == len(BatchesTwice(11, 3, passes=2, seed=0)) == 2 * 3 * 3 * 2
    pieces = np.array(order).reshape(-1, 2, 3)
    assert (pieces[:, 0] == pieces[:, 1]).all()
    assert all(len(set(part[:, 0].ravel().tolist())) == 9 for part in np.split(pieces, 2))
    assert list(BatchesTwice(11, 3, 2, 0)) == order != list(BatchesTwice(11, 3, 2, 1))
    once = list(BatchesTwice(11, 3, 2, 0, times=1))
    assert once == pieces[:, 0].ravel().tolist()  # the same batches, whatever the number of steps


def test_too_long_or_ill_labelled_sequences_are_refused() -> None:
    for name in CURES[1:]:
        with pytest.raises(MomeError, match="does not fit into 24 positions"):
            make_collator(name, pad=PAD, max_positions=ROOM, seed=0)(examples([ROOM]))
    with pytest.raises(MomeError, match="another number of labels"):
        PlainCollator(PAD)([{"input_ids": [1, 2], "labels": [0]}])
    with pytest.raises(MomeError, match="at least one example"):
        PlainCollator(PAD)([])
    with pytest.raises(MomeError, match="no cure 'salt'"):
        make_collator("salt", pad=PAD, max_positions=ROOM, seed=0)
    with pytest.raises(MomeError, match="one permutation"):
        ContextPerturbation(PAD, ROOM, 0, permutations=0)
    with pytest.raises(MomeError, match="as many examples"):
        BatchesTwice(2, 3, 1, 0)


@pytest.mark.parametrize("name", CURES)
def test_any_trainer_takes_them(name: str, tmp_path: Path) -> None:
    base = build_position_model("absolute", Shape(1, 8, 2), causal=False, vocab_size=64, max_positions=ROOM, seed=0)
    base.save_pretrained(tmp_path / "base")
    data = [{"input_ids": [1, 5 + i % 7, 9], "labels": [IGNORED, i % 2, 1]} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )
    trainer = Trainer(
        model=classifier_from(tmp_path / "base", 2, 0), args=arguments, train_dataset=data,
        data_collator=make_collator(name, pad=PAD, max_positions=ROOM, seed=0),
    )
    before = trainer.model.head.weight.clone()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(before, trainer.model.head.weight)
