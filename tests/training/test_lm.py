"""The trainer: its losses do not depend on where it stopped, how many processes ran or how a batch was cut."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambacompress.errors import UserError
from mambacompress.training import lm
from mambacompress.training.lm import CHECKPOINT, RUN, parameter_groups, token_loss, train
from mambacompress.training.log import LOG, read_log
from tests.training.pair import two_processes
from tests.training.toy import VOCABULARY, Toy, Wrapped, config, tokens


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def losses(out: Path, model: Any = None, *, resume: bool = False, ids: torch.Tensor | None = None,
           **changes: Any) -> list[float]:
    rows = train(model or Toy(), tokens() if ids is None else ids, config(**changes), out, resume=resume)
    return [row["loss"] for row in rows]


def stopped(out: Path, steps: int, **changes: Any) -> list[float]:
    """A run whose caller stops reading after ``steps`` steps."""
    run = train(Toy(), tokens(), config(**changes), out)
    seen = [next(run)["loss"] for _ in range(steps)]
    run.close()
    return seen


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_learns(tmp_path: Path):
    seen = losses(tmp_path, steps=40, learning_rate=0.03)
    assert abs(seen[0] - math.log(VOCABULARY)) < 0.6
    assert seen[-1] < 1.2  # the next id is one of two


def test_a_step_is_torchs_adamw_on_the_clipped_gradient(tmp_path: Path):
    """The first step against the same written out: one batch, one backward, one AdamW."""
    from mambacompress.data import training_batches

    trained, plain = Toy(), Toy()
    settings = config(steps=1, warmup=0, clip=0.1)
    row = next(train(trained, tokens(), settings, tmp_path))
    batch_BL = next(training_batches(tokens(), settings.batch, settings.length, settings.seed))
    optimizer = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=settings.learning_rate, betas=(0.9, 0.95))
    loss = token_loss(plain, batch_BL)
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1) > 0.1
    optimizer.step()
    assert row["loss"] == loss.item()
    for (name, a), b in zip(trained.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_loss_is_that_of_the_next_token():
    ids_BL = tokens(24).reshape(2, 12)
    model = Toy()
    logs_BLV = model(ids_BL).logits.log_softmax(-1)
    by_hand = -sum(logs_BLV[b, i, ids_BL[b, i + 1]] for b in range(2) for i in range(11)) / 22
    torch.testing.assert_close(token_loss(model, ids_BL), by_hand)


def test_bf16_is_near_fp32_and_leaves_the_weights_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm, "computes_bf16", lambda device: True)  # where it does not, torch emulates it
    model = Toy()
    rough, exact = losses(tmp_path / "a", model, precision="bf16"), losses(tmp_path / "b")
    assert rough != exact
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(tokens(12)[None]).logits.dtype == torch.float32  # no wrapper left behind


@pytest.mark.parametrize(("there", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_what_the_hardware_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool,
                                                 precision: str):
    monkeypatch.setattr(lm, "computes_bf16", lambda device: there)
    assert losses(tmp_path / "auto", precision="auto") == losses(tmp_path / "named", precision=precision)
    assert json.loads((tmp_path / "auto" / RUN).read_text())["config"]["precision"] == precision
    assert losses(tmp_path / "auto", precision="auto", resume=True) == []


def test_bf16_is_refused_where_it_would_be_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm, "computes_bf16", lambda device: False)
    with pytest.raises(UserError, match=r"no bf16 instructions.*--set precision=fp32"):
        losses(tmp_path, precision="bf16")
    assert not any(tmp_path.iterdir())


def test_accumulation_equals_the_big_batch(tmp_path: Path):
    big, small = Toy(), Toy()
    torch.testing.assert_close(losses(tmp_path / "a", big), losses(tmp_path / "b", small, accumulate=4),
                               rtol=1e-5, atol=0.0)
    for (name, a), b in zip(big.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_see_the_losses_of_one(tmp_path: Path):
    alone = Wrapped()
    one = losses(tmp_path / "one", alone, accumulate=2)
    two = [json.loads(out.splitlines()[-1]) for out in two_processes("toy.py", str(tmp_path / "two"))]
    assert two[0] == two[1]
    torch.testing.assert_close(two[0], one, rtol=1e-5, atol=0.0)
    stored = load_file(tmp_path / "two" / CHECKPOINT)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(stored[f"parameter.{name}"], parameter.detach(), rtol=1e-3, atol=1e-5, msg=name)


# -- stopping and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_resumed_run_repeats_the_losses_and_the_weights_bit_for_bit(tmp_path: Path, at: int):
    whole, again = Toy(), Toy(seed=1)  # the weights of a resumed run come from the checkpoint alone
    straight = losses(tmp_path / "whole", whole)
    first = stopped(tmp_path / "cut", at)
    assert first + losses(tmp_path / "cut", again, resume=True) == straight
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name in (CHECKPOINT, LOG):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_goes_on_across_an_epoch(tmp_path: Path):
    short = {"ids": tokens(150), "steps": 9}  # two batches an epoch
    straight = losses(tmp_path / "whole", **short)
    run = train(Toy(), tokens(150), config(steps=9), tmp_path / "cut")
    first = [next(run)["loss"] for _ in range(5)]
    run.close()
    assert first + losses(tmp_path / "cut", resume=True, **short) == straight


def test_a_kill_goes_on_from_the_last_regular_checkpoint(tmp_path: Path):
    straight = losses(tmp_path / "whole")
    run = train(Toy(), tokens(), config(save_every=3), tmp_path / "killed")
    for _ in range(5):
        next(run)
    as_killed = (tmp_path / "killed" / CHECKPOINT).read_bytes()
    run.close()
    (tmp_path / "killed" / CHECKPOINT).write_bytes(as_killed)  # nothing was written after step 3
    assert len(read_log(tmp_path / "killed")) == 5  # two of them will be done again
    assert losses(tmp_path / "killed", resume=True, save_every=3) == straight[3:]
    assert [row["loss"] for row in read_log(tmp_path / "killed")] == straight


class Interrupted(Toy):
    """Ctrl-C arrives in the forward of call ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(input_ids, use_cache)


def test_ctrl_c_keeps_a_checkpoint(tmp_path: Path):
    straight = losses(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        losses(tmp_path / "cut", Interrupted(at=5))
    assert int(load_file(tmp_path / "cut" / CHECKPOINT)["steps"]) == 4
    assert losses(tmp_path / "cut", resume=True) == straight[4:]


def test_ctrl_c_within_an_update_waits_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = losses(tmp_path / "whole")
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)  # before any weight has moved
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            losses(tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is before
    assert int(load_file(tmp_path / "cut" / CHECKPOINT)["steps"]) == 3
    assert losses(tmp_path / "cut", resume=True) == straight[3:]
    assert [row["loss"] for row in read_log(tmp_path / "cut")] == straight


def test_a_second_ctrl_c_waits_for_the_first_ones_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = losses(tmp_path / "whole")
    write = lm.storage.write_tensors

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lm.storage, "write_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            losses(tmp_path / "cut", Interrupted(at=5))
    assert losses(tmp_path / "cut", resume=True) == straight[4:]


def test_a_caller_that_fails_keeps_a_checkpoint(tmp_path: Path):
    def caller() -> None:
        for row in train(Toy(), tokens(), config(), tmp_path):
            1 // (2 - row["step"])

    with pytest.raises(ZeroDivisionError):
        caller()
    assert int(load_file(tmp_path / CHECKPOINT)["steps"]) == 3


def test_a_finished_run_resumes_to_nothing(tmp_path: Path):
    losses(tmp_path)
    model = Toy(seed=1)
    assert losses(tmp_path, model, resume=True) == []
    stored = load_file(tmp_path / CHECKPOINT)
    assert torch.equal(stored["parameter.head.weight"], model.head.weight)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, RUN, LOG}


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(tmp_path: Path):
    stopped(tmp_path, 2)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        losses(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"learning_rate": 0.02}, r"its learning_rate is 0.01, not 0.02.*go on with --set learning_rate=0.01"),
    ({"steps": 9}, "another configuration: its steps is 8, not 9"),
    ({"ids": tokens(seed=1)}, "another text"),
    ({"model": torch.nn.ModuleDict({"embedding": torch.nn.Embedding(3, 4)})}, "of another model"),
])
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    stopped(tmp_path, 2)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=message):
        losses(tmp_path, resume=True, **changes)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(("name", "content", "message"), [
    (CHECKPOINT, b"\x08", "damaged"), (RUN, b"{", "cannot be read"), (RUN, b"[]", "another configuration")])
def test_a_damaged_run_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    stopped(tmp_path, 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        losses(tmp_path, resume=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path: Path, value: float):
    model = Toy()
    run = train(model, tokens(), config(save_every=1), tmp_path)
    next(run)
    next(run)
    with torch.no_grad():
        model.head.bias[0] = value
    weight = model.mixer.in_proj.weight.clone()
    with pytest.raises(UserError, match=r"the loss became \S+ at step 2"):
        next(run)
    assert torch.equal(model.mixer.in_proj.weight, weight)
    stored = load_file(tmp_path / CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    assert int(stored["steps"]) == 2


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path):
    model = Toy()
    model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="the gradient's norm became nan at step 0"):
        losses(tmp_path, model)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_text_shorter_than_a_batch_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="one batch of 4 x 12"):
        losses(tmp_path, ids=tokens(40))


def test_launched_processes_that_would_train_apart_are_refused(monkeypatch: pytest.MonkeyPatch):
    from mambacompress.training.processes import processes

    processes()  # accelerate's state of this process: alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, and they would train 2 models"):
        processes()


@pytest.mark.parametrize(("asked", "refused"), [(2, True), (1, False)])
def test_a_lone_process_of_several_that_were_asked_for_is_refused(asked: int, refused: bool,
                                                                  monkeypatch: pytest.MonkeyPatch):
    """With the very environment in which accelerate's launcher starts its single process on CPUs."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    from mambacompress.training.processes import processes

    arguments = launch_command_parser().parse_args(["--cpu", "--num_processes", str(asked), "--num_machines", "1",
                                                    "--mixed_precision", "no", "--dynamo_backend", "no", "train.py"])
    for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UserError, match="asked for several processes and started a single one"):
            processes()
    else:
        assert processes().num_processes == 1


# -- parameter groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_matrices_alone_decay(make_host: Any, kind: str):
    from mambacompress.models.families import adopt

    host = make_host(kind)
    adopt(host, prove=False)
    names = {id(parameter): name for name, parameter in host.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(host, 0.1))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    ends = {name.rsplit(".", 2)[-2] for name in decayed}
    projections = {"in_proj", "out_proj"} | ({"x_proj", "dt_proj"} if kind == "mamba" else set())
    assert projections | {"embeddings"} <= ends <= projections | {"embeddings", "lm_head"}
