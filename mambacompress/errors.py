"""What a user did wrong, where, and the next step.

Two kinds of failure reach a user. ``UserError``: the request or its input cannot work (exit code 2). ``CheckFailed``:
the request ran and what came out does not pass its check (exit code 1). Everything else is a bug of ours and keeps its
traceback. A message is one sentence in the user's words; ``next_step`` says what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The request or its input cannot work. str(error) is the message, followed by the next step where there is one."""

    exit_code = 2

    def __init__(self, message: str, next_step: str | None = None) -> None:
        super().__init__(message, next_step)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        if self.next_step is None:
            return self.message
        end = "" if self.message.endswith((".", "?", "!")) else "."
        return f"{self.message}{end} Next step: {self.next_step}"


class CheckFailed(UserError):
    """The request ran, and a check on what came out did not pass."""

    exit_code = 1


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``options``, to append to a message; ``""`` where none is close."""
    known = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.55)
    return f"; did you mean {known[close[0]]!r}?" if close else ""
