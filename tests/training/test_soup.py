"""Sparse soups: what is averaged, what is refused, and that a run goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mambacompress as mc
from mambacompress import souping
from mambacompress.errors import UserError
from mambacompress.nm import Pattern
from mambacompress.training import soup
from mambacompress.training.config import TrainConfig, learning_rate
from mambacompress.training.soup_config import SoupConfig
from mambacompress.training.sparse_config import SparseTraining
from tests.training.pair import two_processes
from tests.training.soup_process import TEXT

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


def rates(training: SparseTraining) -> list[float]:
    run = training.run()
    return [learning_rate(run, step) for step in range(run.steps)]


def test_the_schedules_of_retraining():
    """The original: 100 steps from 1 to 0.1, ten of them warm-up; a phase has 10."""
    own = SparseTraining(steps=10, learning_rate=1.0, warmup=2, final=0.1, schedule="cosine")
    original = TrainConfig(steps=100, learning_rate=1.0, warmup=2, final=0.1)

    def of(retrain: str, took: float = 1.0) -> list[float]:
        [replica] = SoupConfig(replicas=1, retrain=retrain, trained=100).variants(own, took)
        return rates(replica)

    assert of("FT") == pytest.approx([0.1] * 10)
    assert of("LRW") == [learning_rate(original, step) for step in range(90, 100)]
    assert of("SLR") == rates(own)
    assert of("CLR") == pytest.approx([0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)])
    assert of("LLR") == pytest.approx([0.5, 1.0] + [1 - i / 8 for i in range(8)])
    assert of("ALLR", 0.4) == pytest.approx([0.4 * rate for rate in of("LLR")])
    assert of("ALLR", 0.05) == pytest.approx([0.1 * rate for rate in of("LLR")])  # 10 steps of 100
    assert of("ALLR", 1.0) == of("LLR")
    for retrain in ("LRW", "ALLR"):
        with pytest.raises(ValueError, match="how many steps the original was trained"):
            SoupConfig(retrain=retrain)
    with pytest.raises(UserError, match="last learning rate, which is 0"):
        SoupConfig(retrain="FT").variants(own.changed(final=0.0))


def test_what_pruning_took_is_measured(make_host: Any):
    """Of equal weights all that can be taken, none of zeros, and the paper's figure in between."""
    host = make_host("mamba")
    pot = souping._Pot(host, SparseTraining(), SoupConfig(), ["in_proj"], *[None] * 4)
    weights = [p for name, p in host.named_parameters() if name.endswith("in_proj.weight")]
    for weight in weights:
        torch.nn.init.constant_(weight, -2.0)
    assert pot._taken(Pattern(2, 4)) == pytest.approx(1.0)
    for weight in weights:
        weight.data.view(-1, 4)[:] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert pot._taken(Pattern(2, 4)) == pytest.approx((1 / 14 / (1 / 3)) ** 0.5)
    assert pot._taken(Pattern(3, 4)) == 0.0


def test_replicas_are_spread_over_processes(model_directory: Any, tmp_path: Path):
    """Two processes make the artifact of one, each replica trained by one of them."""
    source, runs = model_directory(), (tmp_path / "one", tmp_path / "two")
    mc.soup(source, "soup-2of4", texts=TEXT, eval_texts=TEXT[:2000], out=runs[0], windows=4, overrides=SHORT)
    told = [json.loads(out.splitlines()[-1])
            for out in two_processes("soup_process.py", str(source), str(runs[1]), *SHORT)]
    assert [sorted(set(stages)) for stages in told] == [["phase0-baseline", "phase1-baseline"], [
        "phase0-replica0", "phase0-replica1", "phase1-replica0", "phase1-replica1"]]
    one, two = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


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
    with pytest.raises(UserError, match="another recipe or text"):
        mc.soup(source, "soup-2of4", texts=TEXT, eval_texts=TEXT[:1000], out=tmp_path / "cut", windows=4, resume=True,
                overrides=SHORT)
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
