"""Sparse soups: what is averaged, what is refused, and that a run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mambacompress as mc
from mambacompress.errors import UserError
from mambacompress.nm import Pattern
from mambacompress.training import soup
from mambacompress.training.sparse_config import SoupConfig, SparseTraining

TEXT = "\n".join(f"a small text, line {i} of many, for a small model" for i in range(300))
SHORT = ["training.steps=3", "training.batch=2", "training.length=16", "training.warmup=1", "training.precision=fp32",
         "training.learning_rate=5e-3", "soup.replicas=2", "calibration.sequences=2", "calibration.length=16"]


def test_an_average_is_a_mean_and_keeps_the_zeros():
    a, b = {"w": torch.tensor([[1.0, 0, 0, 2]])}, {"w": torch.tensor([[3.0, 0, 0, -2]])}
    assert torch.equal(soup.average([a, b], {"w": Pattern(2, 4)})["w"], torch.tensor([[2.0, 0, 0, 0]]))
    assert soup.distances([a, b]) == pytest.approx([5**0.5] * 2)
    with pytest.raises(UserError, match="different masks in w"):
        soup.average([a, {"w": torch.tensor([[0.0, 3, 0, -2]])}], {"w": Pattern(2, 4)})
    with pytest.raises(UserError, match="other tensors"):
        soup.average([a, {"w": torch.zeros(1, 8)}], {})


def test_a_greedy_soup_takes_what_does_not_hurt():
    states = [{"w": torch.tensor([value])} for value in (1.0, -1.5, 10.0)]
    taken = soup.greedy(states, [1.0, 1.5, 10.0], lambda state: abs(float(state["w"])), {})
    assert taken == [0, 1]


def test_replicas_differ_in_one_factor():
    training = SparseTraining(learning_rate=1e-3, seed=4)
    seeds = SoupConfig(replicas=3).variants(training)
    assert [variant.seed for variant in seeds] == [4, 5, 6]
    assert {variant.learning_rate for variant in seeds} == {1e-3}
    rates = SoupConfig(replicas=3, vary="learning_rate").variants(training)
    assert [variant.learning_rate for variant in rates] == pytest.approx([1e-3 / 2**0.5, 1e-3, 1e-3 * 2**0.5])
    assert {variant.seed for variant in rates} == {4}
    with pytest.raises(ValueError, match="2 values do not make 3 replicas"):
        SoupConfig(replicas=3, values=(1, 2))


def test_a_soup_is_sparse_and_goes_on_where_it_stopped(model_directory: Any, tmp_path: Path):
    source = model_directory()

    def run(out: Path, stop: str | None = None, resume: bool = False, **options: Any) -> mc.Compressed:
        def progress(stage: str, done: int, total: int, figures: Any) -> None:
            assert figures["sparsity"] == (0.25 if stage.startswith("phase0") else 0.5)
            if stage == stop and done == 2:
                raise KeyboardInterrupt

        return mc.soup(source, "soup-2of4", texts=TEXT, eval_texts=TEXT[:2000], out=out, windows=4, resume=resume,
                       overrides=SHORT, progress=progress, **options)

    made = run(tmp_path / "whole")
    assert set(mc.verify(made.directory)["patterns"].values()) == {"2:4"}
    phases = json.loads((tmp_path / "whole.soup" / "soup.json").read_text())["phases"]
    assert [phase["pattern"] for phase in phases] == ["3:4", "2:4"]
    for phase in phases:
        assert len(phase["candidates"]) == 2
        assert phase["candidates"][0] != phase["candidates"][1]
        assert phase["best"] <= phase["mean"]
        assert phase["ensemble"] <= phase["mean"]  # the mean of distributions, by convexity
        assert {"soup", "compute_matched", "distance_to_barycentre"} <= set(phase)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop="phase1-replica0")
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_what_is_refused(model_directory: Any):
    source = model_directory()
    with pytest.raises(UserError, match="averages replicas"):
        mc.sparsify(source, "soup-2of4", texts=TEXT)
    with pytest.raises(UserError, match="has no soup, training and prune sections"):
        mc.soup(source, "nm-2of4", texts=TEXT, eval_texts=TEXT)
    with pytest.raises(UserError, match="soup needs a training section"):
        mc.load_recipe("nm-2of4", ["soup.replicas=2"])
