"""The speed and kernel benchmarks: what the goals are read off, tiny artifacts, and op errors that are small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, op_errors, speed
from benchmarks.checkpoints import SHAPES, write_artifact, write_model
from mambacompress.bench import Result
from mambacompress.recipe import recipe_names


def row(name: str, kind: str, variant: str, **rates: list[float]) -> dict[str, Any]:
    sizes = {"start": 50, "load": 90, "prefill": 110, "decode": 100}
    memory = {stage: {"anonymous": size, "resident": 2 * size - 50} for stage, size in sizes.items()}
    return {"name": name, "kind": kind, "variant": variant, "files": 100, "error": None, "likeness": {}, "facts": {},
            "memory": memory | {"live_tensors": 110}, "rates": rates}


@pytest.fixture
def results() -> dict[str, Result]:
    rows = [row("mamba-130m fp32", "ours", "fp32", decode=[30.0, 30.0]),
            row("mamba-130m-w8a8", "ours", "packed", decode=[300.0, 100.0], prefill=[900.0, 700.0]),
            row("mamba-130m-w8a8 state8", "ours", "packed-state8", decode=[330.0, 120.0]),
            row("mamba-130m-w8a8-scan8", "ours", "packed", decode=[150.0, 50.0]),
            row("mamba-130m-w8a8-scan8 state8", "ours", "packed-state8", decode=[150.0, 100.0]),
            row("llama.cpp Q8_0", "llama.cpp", "Q8_0", decode=[100.0, 50.0], prefill=[100.0, 100.0]),
            row("transformers fp32", "transformers", "fp32", decode=[15.0, 10.0])]
    document = {"settings": {"prompt": 512, "steps": 64, "batch": 8, "rounds": 2}, "reference": "llama.cpp Q8_0",
                "left_out": [], "runs": [{"threads": 1, "contestants": rows}]}
    return {"130m": Result(document)}


def test_goals_are_read_off_rounds(results: dict[str, Result]) -> None:
    judged = {(goal["title"], goal["rival"]): goal for goal in speed.judged(results)}
    assert judged[("int8 decode", "llama.cpp Q8_0")]["ratio"]["median"] == 2.5  # of 3 and 2, not of medians
    assert judged[("int8 decode", "llama.cpp Q8_0")]["met"]
    assert judged[("int8 prefill", "llama.cpp Q8_0")]["ratio"]["median"] == 8.0
    assert judged[("original fp32 decode", "transformers fp32")]["ratio"]["median"] == 2.5
    assert not any("Mamba-2" in title for title, _ in judged)


def test_memory_bandwidth_and_tables(results: dict[str, Result]) -> None:
    memory = list(speed.memory_rows(results))
    assert len(memory) == 4
    assert {found["share"] for found in memory} == {1.2}
    shares = {found["name"]: found["share"] for found in speed.bandwidth_rows(results, {1: 40_000.0})}
    assert shares["mamba-130m-w8a8"] == 0.5
    assert shares["llama.cpp Q8_0"] == 75 * 100 / 40_000
    shown = speed.markdown(results, {1: 40e9})
    assert "| int8 decode | 130m | 1 | llama.cpp Q8_0 | 2 | 2.5 | 2.50 (2.25-2.75) | met |" in shown
    assert "Read bandwidth: 40.0 GB/s with 1 thread." in shown
    assert "## mamba-130m" in shown


def test_variants_are_set_beside_the_plain_form(results: dict[str, Result]) -> None:
    found = {(row["name"], row["plain"]): row["ratio"]["median"] for row in speed.variant_rows(results)}
    assert found == {("mamba-130m-w8a8 state8", "mamba-130m-w8a8"): pytest.approx(1.15),
                     ("mamba-130m-w8a8-scan8", "mamba-130m-w8a8"): 0.5,
                     ("mamba-130m-w8a8-scan8 state8", "mamba-130m-w8a8-scan8"): 1.5}
    assert "| mamba-130m-w8a8-scan8 | 1 | mamba-130m-w8a8 | decode | 0.50" in speed.markdown(results, {1: 40e9})


def test_every_goal_names_what_takes_part() -> None:
    from mambacompress.bench.runner import KINDS

    rivals = {f"{title} {variant}" for kind, title in (("llama.cpp", "llama.cpp"), ("openvino", "OpenVINO"),
                                                        ("transformers", "transformers"))
              for variant in KINDS[kind].variants}
    assert {goal.rival for goal in speed.GOALS} <= rivals
    assert {goal.ours for goal in speed.GOALS} <= {*recipe_names(), "fp32", "bf16"}
    assert {goal.family for goal in speed.GOALS} == {shape["model_type"] for shape in SHAPES.values()}


@pytest.mark.parametrize("size", ["tiny", "mamba2-tiny"])
def test_models_and_artifacts_are_made_once(size: str, tmp_path: Path) -> None:
    model = write_model(size, tmp_path)
    artifact = write_artifact(model, "w8a8")
    assert artifact.name == speed.row_name(size, "w8a8")
    assert speed.row_name(size, "fp32") == f"{model.name} fp32"
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert (write_model(size, tmp_path), write_artifact(model, "w8a8")) == (model, artifact)
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}


def test_every_op_is_near_fp64() -> None:
    rows = list(op_errors.measure(1))
    assert {found.op for found in rows} >= {
        "selective_scan", "selective_state_update", "ssd_scan", "ssd_state_update", "causal_conv1d", "rms_norm",
        "gated_rms_norm", "hadamard", "int8_linear", "int4_linear", "mixer_step"}
    for found in rows:
        assert found.typical < (2e-3 if found.dtype == "bfloat16" else 1e-6), found
        assert found.worst < (0.3 if found.dtype == "bfloat16" else 1e-4), found
    assert op_errors.table(rows).count("\n| ") == len(rows)


def test_scans_and_trainers_agree_and_take_turns() -> None:
    scans = kernels.scan_contestants(1, 12, 8)
    trainers, parameters = kernels.training_contestants(1, 8)
    assert 4e6 < parameters < 6e6
    timed = kernels.take_turns(scans, 2, {"selective_scan": 3})
    assert {name: len(found) for name, found in timed["seconds"].items()} == {"selective_scan": 2,
                                                                              "torch, sequential": 2}
    for name in trainers:
        trainers[name]()
    document = {"timings": [{"what": "scan", "threads": 1, "tokens": 12, "must": 25, **timed}], "errors": []}
    assert "| scan | 1 | torch, sequential |" in kernels.markdown(document)
