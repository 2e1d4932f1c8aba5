"""Settings of a run: the schedules' shapes, and overrides that fit or say what is wrong."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.errors import UserError
from mambacompress.training.config import SETTINGS, TrainConfig, learning_rate, overridden

BASE = TrainConfig(steps=1000)


# -- schedules ---------------------------------------------------------------------------------------------------------


CONFIGS = st.builds(TrainConfig, steps=st.integers(20, 3000), warmup=st.integers(0, 19), final=st.floats(0, 1),
                    schedule=st.sampled_from(["cosine", "wsd"]), learning_rate=st.floats(1e-5, 1e-1))


@given(CONFIGS)
def test_a_schedule_climbs_in_warm_up_and_never_rises_after(settings: TrainConfig):
    rates = [learning_rate(settings, step) for step in range(settings.steps)]
    peak, slack = settings.learning_rate, settings.learning_rate * 1e-9
    assert all(a < b for a, b in pairwise(rates[: settings.warmup]))
    after = rates[settings.warmup :]
    assert after[0] == pytest.approx(peak)
    assert all(a >= b - slack for a, b in pairwise(after))
    assert min(after) >= settings.final * peak - slack
    assert learning_rate(settings, settings.steps) == pytest.approx(settings.final * peak, abs=slack)


def test_the_schedules_at_known_points():
    cosine = TrainConfig(steps=110, warmup=10, learning_rate=1.0, final=0.1)
    assert [learning_rate(cosine, step) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55])
    wsd = replace(cosine, schedule="wsd")
    assert [learning_rate(wsd, step) for step in (9, 10, 89, 100)] == pytest.approx([1.0, 1.0, 1.0, 0.55])


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "cosin"}, "did you mean 'cosine'"), ({"precision": "fp16"}, "unknown precision"),
    ({"accumulate": 3}, "does not divide"), ({"accumulate": 0}, "at least 1"), ({"steps": 0}, "at least 1"),
    ({"length": 1}, "at least 2"), ({"warmup": -1}, "at least 0"), ({"save_every": 0}, "at least 1"),
    ({"learning_rate": 0.0}, "above 0"), ({"learning_rate": math.nan}, "above 0"), ({"clip": -1.0}, "above 0"),
    ({"weight_decay": math.inf}, "at least 0"), ({"final": 1.5}, "between 0 and 1"), ({"seed": -1}, "from 0"),
    ({"steps": 100}, r"warm-up of 100 steps does not fit.*--set warmup=10"),
])
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(BASE, **changes)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_every_setting_can_be_written_as_text():
    other = TrainConfig(steps=900, batch=4, length=64, learning_rate=0.001, final=0.1, warmup=7, schedule="wsd",
                        weight_decay=0.0, clip=2.0, accumulate=2, seed=3, precision="auto", save_every=50)
    assert set(asdict(other)) == set(SETTINGS)
    assert overridden(BASE, [f"{key}={value}" for key, value in asdict(other).items()]) == other
    assert overridden(BASE, asdict(other)) == other


def test_numbers_are_read_as_people_write_them():
    changed = overridden(BASE, ["learning_rate = 3e-4", "final=0", "steps=2_000", "steps=3000"])
    assert (changed.learning_rate, changed.final, changed.steps) == (3e-4, 0.0, 3000)
    assert isinstance(overridden(BASE, {"final": 0}).final, float)
    assert overridden(BASE, ()) == BASE


@pytest.mark.parametrize(("changes", "message"), [
    (["stepz=5"], r"no setting 'stepz'; did you mean 'steps'\?.*settings: steps, batch"),
    (["optimizer=sgd"], "no setting 'optimizer'"),
    (["steps"], "'steps' is not of the form key=value"),
    (["=5"], "not of the form key=value"),
    (["steps=many"], "steps is 'many', which is no whole number. Next step: write for example --set steps=1000"),
    (["steps=1.5"], "no whole number"),
    (["clip="], "clip is '', which is no number"),
    (["precision=no"], "unknown precision 'no'.*choose fp32 or bf16 or auto"),
    ({"steps": 1.5}, "no whole number"),
    ({"steps": True}, "no whole number"),
    ({"final": None}, "no number"),
    ({"schedule": 1}, "no word"),
    (["batch=0"], "batch = 0 is no training run"),
])
def test_a_bad_override_is_a_sentence(changes: Any, message: str):
    with pytest.raises(UserError, match=message):
        overridden(BASE, changes)
