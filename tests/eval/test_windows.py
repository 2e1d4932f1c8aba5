"""Every token scored once, by a window that starts where it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.errors import UserError
from mambacompress.eval.windows import make_windows, tokens_of


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_every_predictable_token_is_scored_exactly_once(total: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = make_windows(torch.arange(total), context, stride)
    scored = [index for _, end, first in windows.spans for index in range(first, end)]
    assert scored == sorted(set(scored))
    unpredictable = {0} | ({start for start, _, _ in windows.spans} if stride == context else set())
    if stride == context and (total - 1) % context == 0:
        unpredictable.add(total - 1)  # a last window of one token
    assert set(scored) == set(range(total)) - unpredictable
    for start, end, first in windows.spans[1:]:
        assert end - start <= context
        assert start < first
        assert first - start >= min(context - stride, first) or stride == context  # the history each scored token has


@given(st.integers(2, 200), st.integers(2, 40), st.integers(1, 5))
def test_batches_hold_every_window_once_and_mark_its_scored_tokens(total: int, context: int, size: int) -> None:
    windows = make_windows(torch.arange(total), context, max(1, context // 3))
    seen: list[int] = []
    for ids, scored, group in windows.batches(size):
        assert ids.shape[0] == len(group) <= size
        assert scored.shape == (ids.shape[0], ids.shape[1] - 1)
        for row, index in enumerate(group):
            start, end, first = windows.spans[index]
            assert ids[row].tolist() == list(range(start, end))
            assert (ids[row, 1:][scored[row]]).tolist() == list(range(first, end))
        seen += group
    assert seen == list(range(len(windows.spans)))


def test_disjoint_windows_are_the_papers_convention() -> None:
    windows = make_windows(torch.arange(1600), context=512, limit=2)
    assert windows.spans == ((0, 512, 1), (512, 1024, 513))
    assert windows.counts == [511, 511]


def test_the_fingerprint_tells_tokens_and_windows_apart() -> None:
    tokens = torch.arange(100)
    same = make_windows(tokens, 16, limit=3)
    assert (
        same.fingerprint == make_windows(torch.arange(48), 16, limit=3).fingerprint
    )  # what is not read does not count
    others = [
        make_windows(tokens, 16, 8, limit=3),
        make_windows(tokens, 17, limit=3),
        make_windows(tokens.flip(0), 16, limit=3),
    ]
    assert len({same.fingerprint, *(window.fingerprint for window in others)}) == 4


@pytest.mark.parametrize(
    ("total", "context", "stride", "limit", "words"),
    [
        (0, 8, None, None, "empty"),
        (1, 8, None, None, "single token"),
        (20, 1, None, None, "predicts nothing"),
        (20, 8, 9, None, "leaves tokens out"),
        (20, 8, 0, None, "leaves tokens out"),
        (20, 8, None, 0, "no request"),
    ],
)
def test_bad_requests_name_the_next_step(
    total: int, context: int, stride: int | None, limit: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_windows(torch.arange(total), context, stride, limit)
    assert caught.value.next_step


def test_blank_text_is_an_error() -> None:
    with pytest.raises(UserError, match="'novels' is empty"):
        tokens_of(None, ["", "  \n"], "novels")
