"""Profiles: presets hold together, overrides are checked."""

import pytest

from mome_utils.config import MomeError, Shape, load_profile, profile_names


@pytest.mark.parametrize("name", profile_names())
def test_presets_are_sound(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.stride < profile.block_size
    assert profile.student.width <= profile.teacher.width


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(MomeError, match="no profile 'desktop': choose one of smoke, laptop, gpu, paper"):
        load_profile("desktop")


def test_overrides_take_text_as_a_command_line_gives_it():
    profile = load_profile("smoke", {"max_diff_percent": "3", "student": "1,16,2", "common_documents": "false",
                                     "topics": "None"})
    assert profile.max_diff_percent == 3.0
    assert profile.student == Shape(1, 16, 2)
    assert profile.common_documents is False
    assert profile.topics is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("colour", 1, "no field 'colour'"),
        ("block_size", "many", "needs a value of type int"),
        ("block_size", 0, "must be positive"),
        ("topics", "nan", "needs a value of type int"),
        ("teacher_lr", float("inf"), "needs a value of type float"),
        ("block_size", 1.5, "needs a value of type int"),
        ("stride", 64, "must be smaller than the block"),
        ("student", [1, 33, 2], "multiple of the heads"),
        ("dtype", "float8", "dtype must be"),
        ("alpha", 2, "between 0 and 1"),
        ("test_fraction", 0.95, "leave room for training"),
        ("max_diff_percent", -1, "0 or more"),
    ],
)
def test_bad_overrides_get_one_sentence(field, value, message):
    with pytest.raises(MomeError, match=message) as error:
        load_profile("smoke", {field: value})
    assert "\n" not in str(error.value)
