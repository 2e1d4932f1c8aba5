"""The benchmark of sparse linears: its models hold what they say, and its figures follow from what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mambacompress as mc
from benchmarks import sparse_speed
from benchmarks.checkpoints import write_artifact, write_model
from benchmarks.sparse_speed import DENSE, Variant
from mambacompress.models.packed import PackedHead, PackedLinear, PackedSparseHead, PackedSparseLinear


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(write_model("tiny", tmp_path_factory.mktemp("speed")), "w8a8")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_a_variant_is_the_dense_model_with_fewer_weights(artifact: Path, pattern: str, head: bool) -> None:
    dense, (model, share) = mc.load(artifact), sparse_speed.pruned(artifact, Variant(pattern, head))
    mixer, original = model.backbone.layers[1].mixer, dense.backbone.layers[1].mixer
    assert isinstance(mixer.out_proj, PackedSparseLinear)
    assert isinstance(mixer.paths[0].projection.x_proj, PackedLinear)
    assert type(model.lm_head) is (PackedSparseHead if head else PackedHead)
    pairs = [(mixer.in_proj, original.in_proj), (mixer.out_proj, original.out_proj)]
    pairs += [(model.lm_head, dense.lm_head), (model.backbone.embeddings, dense.backbone.embeddings)] if head else []
    for sparse, whole in pairs:
        assert str(sparse.pattern) == pattern
        assert torch.equal(sparse.codes(), whole.codes().masked_fill(~sparse.kept(), 0))
        groups = whole.codes().abs().unflatten(1, (-1, sparse.pattern.of)).int()
        kept = sparse.kept().unflatten(1, (-1, sparse.pattern.of))
        assert (groups.masked_fill(~kept, 999).amin(-1) >= groups.masked_fill(kept, -1).amax(-1)).all()
    if head:
        assert model.lm_head.stream is model.backbone.embeddings.stream
    bits = {"2:4": 5, "1:8": 1.375}[pattern]
    assert bits / 8 < share["stored"] < bits / 8 + 0.1  # scales beside it
    assert share["read"] >= share["stored"]


def test_a_wrong_answer_stops_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([torch.zeros(1), torch.ones(1)])
    monkeypatch.setattr(sparse_speed, "_logits", lambda model, ids: next(answers))
    with pytest.raises(RuntimeError, match="2:4: the sparse linears do not answer as their dense weights do"):
        sparse_speed.pruned(artifact, Variant("2:4"))


def test_in_a_round_everyone_runs_once_and_the_order_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    rates = sparse_speed.race({name: name for name in "abc"}, measure, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first three warm up
    assert rates == {"a": [4.0, 9.0, 11.0], "b": [5.0, 7.0, 12.0], "c": [6.0, 8.0, 10.0]}


def test_ratios_are_of_the_same_round_and_goals_are_judged() -> None:
    found = sparse_speed.ratios({DENSE: [1.0, 2.0, 4.0], "2:4": [2.0, 2.0, 6.0]})
    assert found.keys() == {"2:4"}
    assert found["2:4"].median == 1.5
    weights = {"2:4": {"stored": 0.625, "read": 0.63}}
    for median, verdict in ((1.2, "goal 1.15: met"), (1.1, "goal 1.15: missed")):
        ratio = {"median": median, "low": 1.0, "high": 1.3}
        text = sparse_speed.table("130m", {"measure": "decode", "threads": 2, "rates": {DENSE: [3.0, 5.0, 4.0]},
                                           "ratios": {"2:4": ratio}}, weights)
        assert verdict in text
        assert "mamba-130m, decode, 2 thread(s): dense 4.0 tokens/s" in text


def test_the_command_writes_its_figures(tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sparse_speed, "VARIANTS", (Variant("2:4"), Variant("1:4", True)))
    out, before = tmp_path / "sparse.json", torch.get_num_threads()
    sparse_speed.main(["--sizes", "tiny", "--threads", "1", "--folder", str(artifact.parent), "--rounds", "2",
                       "--steps", "3", "--length", "8", "--out", str(out)])
    assert torch.get_num_threads() == before
    (document,) = json.loads(out.read_text(encoding="utf-8"))["sizes"]
    assert document["size"] == "mamba-tiny"
    assert document["bytes"].keys() == {"2:4", "1:4 with the head"}
    assert [(run["threads"], run["measure"]) for run in document["runs"]] == [(1, "decode"), (1, "prefill")]
    for run in document["runs"]:
        assert run["rates"].keys() == {DENSE, "2:4", "1:4 with the head"}
        for name, spread in run["ratios"].items():
            shares = [a / b for a, b in zip(run["rates"][name], run["rates"][DENSE], strict=True)]
            assert spread["median"] == pytest.approx(sum(shares) / 2)
    assert capsys.readouterr().out.count("tokens/s") == 2
