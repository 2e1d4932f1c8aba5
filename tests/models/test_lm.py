"""The lean loop computes what the host computes, and its generation is transformers' generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.families import adopt
from mambacompress.models.lm import LanguageModel, _greedy, generate, stream
from mambacompress.models.mixers import MixerState

KINDS = ["mamba", "mamba2", "falcon_mamba"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def make_lm(make_host: Callable[..., Any]) -> Callable[..., LanguageModel]:
    """make_lm(kind, **config) -> the view of a random adopted host."""
    return lambda kind, **overrides: LanguageModel(adopt(make_host(kind, **overrides)))


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 97, (batch, length))


def host_logits(lm: LanguageModel, x: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return lm.model_map.host(x, **kwargs).logits


def prefill(lm: LanguageModel, x: Tensor, **kwargs: Any) -> tuple[Tensor, list[MixerState]]:
    with torch.no_grad():
        return lm.prefill(x, **kwargs)


def same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return ((got - want).abs().max() / want.abs().max()).item() < tolerance


def no_end(lm: LanguageModel) -> dict[str, Any]:
    """Options under which transformers and we both run to the end."""
    return {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_prefill_is_the_hosts_forward(make_lm: Callable[..., LanguageModel], kind: str, dtype: torch.dtype,
                                      residual_in_fp32: bool) -> None:
    lm = make_lm(kind, residual_in_fp32=residual_in_fp32)
    lm.model_map.host.to(dtype)
    x = ids(2, 15)
    got, states = prefill(lm, x)
    assert torch.equal(got, host_logits(lm, x))
    assert got.dtype == torch.float32
    assert len(states) == len(lm.model_map.blocks)
    last, _ = prefill(lm, x, last_only=True)
    assert last.shape == (2, 1, 97)
    assert same(last, got[:, -1:])


@each_kind
def test_steps_equal_prefill(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm = make_lm(kind)
    x = ids(2, 40)
    want, _ = prefill(lm, x)
    first, states = prefill(lm, x[:, :3])
    outputs = [first]
    for t in range(3, 40):
        with torch.no_grad():
            logits, states = lm.step(x[:, t], states)
        outputs.append(logits[:, None])
    got = torch.cat(outputs, 1)
    assert same(got, want)
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.999


@each_kind
def test_prefill_continues_from_states(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm = make_lm(kind)
    x = ids(2, 20)
    want, _ = prefill(lm, x)
    _, states = prefill(lm, x[:, :7])
    for _ in range(2):  # states are not consumed
        assert same(prefill(lm, x[:, 7:], states=states)[0], want[:, 7:])


@each_kind
def test_left_padding_and_packing(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm = make_lm(kind)
    long, short = ids(1, 9), ids(1, 5)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    together, _ = prefill(lm, padded, attention_mask=mask)
    assert same(together[1, 4:], prefill(lm, short)[0][0])
    packed, _ = prefill(lm, torch.cat([long, short], 1), seq_idx=torch.tensor([[0] * 9 + [1] * 5]))
    assert same(packed[0, :9], prefill(lm, long)[0][0])
    assert same(packed[0, 9:], prefill(lm, short)[0][0])


@each_kind
def test_greedy_equals_transformers(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm = make_lm(kind)
    x = ids(3, 6)
    expected = lm.model_map.host.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, **no_end(lm))
    assert torch.equal(generate(lm, x, 16, eos_token_id=()), expected)
    assert torch.equal(generate(lm.model_map.host, x, 16, eos_token_id=()), expected)


@each_kind
def test_left_padded_greedy_equals_transformers_and_alone(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm = make_lm(kind)
    prompts = [ids(1, 7), ids(1, 3), ids(1, 1)]
    batch = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    got = generate(lm, batch, 10, eos_token_id=(), attention_mask=mask)
    assert torch.equal(got, lm.model_map.host.generate(batch, attention_mask=mask, max_new_tokens=10, **no_end(lm)))
    for row, prompt in zip(got, prompts, strict=True):
        assert torch.equal(row[7:], generate(lm, prompt, 10, eos_token_id=())[0, prompt.shape[1]:])


def test_rows_stop_at_their_end_and_are_padded_as_in_transformers(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(4, 5)
    free = generate(lm, x, 12, eos_token_id=())[:, 5:]
    end = int(free[0, 3])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": 96}
    expected = lm.model_map.host.generate(x, attention_mask=torch.ones_like(x), **options)
    got = generate(lm, x, 12, eos_token_id=end, pad_token_id=96)
    assert torch.equal(got, expected)
    place = free[0].tolist().index(end)
    assert got[0, 5 + place + 1 :].eq(96).all()
    alone = generate(lm, x[:1], 12, eos_token_id=[end])
    assert alone.shape[1] == 5 + place + 1  # it does not go on for nobody
    assert int(alone[0, -1]) == end


def test_the_models_own_end_is_the_default(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(1, 5)
    end = int(generate(lm, x, 3, eos_token_id=())[0, -1])
    lm.model_map.host.generation_config.eos_token_id = end
    assert generate(lm, x, 30).shape[1] <= 8


@each_kind
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5},
                                     {"temperature": 1.5, "top_p": 0.8},
                                     {"temperature": 4.0, "top_k": 20, "top_p": 0.9}], ids=str)
def test_a_seed_fixes_the_text(make_lm: Callable[..., LanguageModel], kind: str, options: dict[str, Any]) -> None:
    lm = make_lm(kind)
    x = ids(2, 4)
    first, again, other = (generate(lm, x, 20, eos_token_id=(), seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 24)
    assert first.max() < 97


def test_sampling_follows_the_distribution(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(1, 4).expand(8000, -1).contiguous()
    logits, _ = prefill(lm, x[:1])
    drawn = generate(lm, x, 1, temperature=0.5, top_k=4, eos_token_id=())[:, -1]
    p, kept = torch.softmax(logits[0, -1] / 0.5, -1).topk(4)
    counts = torch.stack([(drawn == token).sum() for token in kept]) / len(drawn)
    assert torch.allclose(counts, p / p.sum(), atol=0.025)


def test_top_p_keeps_the_smallest_set_that_holds_it(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(1, 4).expand(4000, -1).contiguous()
    logits, _ = prefill(lm, x[:1])
    p, order = torch.softmax(logits[0, -1].double(), -1).sort(descending=True)
    kept = int((p.cumsum(0) - p < 0.3).sum())
    drawn = generate(lm, x, 1, temperature=1.0, top_p=0.3, eos_token_id=())[:, -1]
    assert set(drawn.tolist()) == set(order[:kept].tolist())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_greedy(make_lm: Callable[..., LanguageModel], options: dict[str, Any]) -> None:
    lm = make_lm("mamba2")
    x = ids(2, 5)
    greedy = generate(lm, x, 12, eos_token_id=())
    assert torch.equal(generate(lm, x, 12, eos_token_id=(), **({"temperature": 1.0} | options)), greedy)


def test_streaming_gives_each_step_as_it_is_made(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(2, 5)
    whole = generate(lm, x, 8, eos_token_id=())
    pieces = stream(lm, x, 8, eos_token_id=())
    assert torch.equal(next(pieces), whole[:, 5])
    assert torch.equal(torch.stack(list(pieces), 1), whole[:, 6:])
    seen: list[Tensor] = []
    generate(lm, x, 8, eos_token_id=(), on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), whole[:, 5:])


def test_a_stream_leaves_gradients_on_outside(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    for _ in stream(lm, ids(1, 3), 2, eos_token_id=()):
        assert torch.is_grad_enabled()
    assert prefill(lm, ids(1, 3))[0].requires_grad is False
    assert lm.prefill(ids(1, 3))[0].requires_grad


def test_nothing_asked_gives_the_prompt(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm("mamba")
    x = ids(2, 5)
    assert torch.equal(generate(lm, x, 0), x)


@pytest.mark.parametrize(("change", "message"), [
    ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"shape \[2, 0\]"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"shape \[3\]"),
    ({"input_ids": torch.zeros(1, 3)}, "float32"),
    ({"input_ids": torch.full((1, 3), 97)}, "outside the vocabulary of 97"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1.0, "top_k": 0}, "top_k"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
    ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the right"),
    ({"attention_mask": torch.tensor([[0, 0, 0]])}, "padded on the right"),
    ({"attention_mask": torch.tensor([[1, 1]])}, r"has shape \[1, 2\]"),
])
def test_what_cannot_work_is_said_before_the_first_step(make_lm: Callable[..., LanguageModel], change: dict[str, Any],
                                                        message: str) -> None:
    arguments = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 2} | change
    with pytest.raises(UserError, match=message) as caught:
        stream(make_lm("mamba"), **arguments)  # no step taken
    assert caught.value.next_step


def test_a_stock_model_is_refused(tiny_mamba: Any) -> None:
    with pytest.raises(UserError, match="does not run on our mixers"):
        generate(tiny_mamba, ids(1, 3), 2)


def test_greedy_is_torchs_argmax() -> None:
    logits = torch.randn(3, 501)
    logits[0, 7] = logits[0, 400] = 9.0  # the first of equals
    logits[1, 300] = logits[1, 30] = float("nan")
    assert torch.equal(_greedy(logits), logits.argmax(-1))
