"""Messages a user reads."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.errors import CheckFailed, UserError, did_you_mean


def test_message_and_next_step_are_one_text():
    assert str(UserError("the file is gone", "check the path")) == "the file is gone. Next step: check the path"
    assert str(UserError("really?", "yes")) == "really? Next step: yes"
    assert str(UserError("the file is gone")) == "the file is gone"


def test_exit_codes_tell_bad_input_from_a_failed_check():
    assert UserError("x").exit_code == 2
    assert CheckFailed("x").exit_code == 1
    assert issubclass(CheckFailed, UserError)


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(CheckFailed("a", "b")))
    assert (type(error), error.message, error.next_step) == (CheckFailed, "a", "b")


@pytest.mark.parametrize(("name", "expected"), [
    ("w8a9", "w8a8"), ("W8A8", "w8a8"), ("w4a16x", "w4a16"), ("quarot", "quarot-w8a8"),
])
def test_near_names_are_offered(name: str, expected: str):
    assert did_you_mean(name, ["w8a8", "w4a16", "quarot-w8a8"]) == f"; did you mean {expected!r}?"


def test_far_names_offer_nothing():
    assert did_you_mean("zebra", ["w8a8", "w4a16"]) == ""
    assert did_you_mean("zebra", []) == ""


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=5))
def test_only_known_names_are_ever_offered(name: str, options: list[str]):
    offered = did_you_mean(name, options)
    assert offered == "" or any(offered == f"; did you mean {option!r}?" for option in options)
