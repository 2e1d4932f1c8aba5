"""What every command shares: errors become one sentence and an exit code, and options that take several values."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mambacompress.errors import CheckFailed, UserError

Texts = Annotated[
    list[Path] | None, typer.Option("--text", metavar="FILE...", help="Text: .txt or .jsonl, or their .xz or .gz.")
]
Device = Annotated[str, typer.Option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1, ...")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe: passes.quantize.group_size=32; passes.rotate=null takes a pass out.",
    ),
]
StrictKernels = Annotated[
    bool, typer.Option("--strict-kernels", help="Fail where an op would fall back to a slower kernel.")
]


class Interrupted(UserError):
    """Ctrl-C; the message says what is left and how to go on."""

    exit_code = 130


class Command(TyperCommand):
    """A command whose UserErrors and interrupts end in one sentence on stderr and their exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; never a traceback for what a user can mend."""
        _quiet()
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(Interrupted("interrupted"))
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


class Greedy(Command):
    """A command whose ``--text``, ``--eval-text`` and ``--tasks`` take every value up to the next option:
    ``--text a.txt b.txt``.
    """

    greedy = ("--text", "--eval-text", "--tasks")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell ``--text a b`` out as ``--text a --text b``."""
        spelled: list[str] = []
        option: str | None = None
        first = False
        for i, arg in enumerate(args):
            if arg == "--":
                spelled += args[i:]
                break
            if arg.startswith("-") and arg != "-":
                option, first = (arg, True) if arg in self.greedy else (None, False)
                spelled.append(arg)
            elif option is not None and not first:
                spelled += [option, arg]
            else:
                spelled.append(arg)
                first = False
        return super().parse_args(ctx, spelled)


def _fail(error: UserError) -> None:
    end = "" if error.message.endswith((".", "?", "!")) else "."
    typer.echo(f"Error: {error.message}{end}", err=True)
    if error.next_step:
        typer.echo(f"Next step: {error.next_step}", err=True)
    raise typer.Exit(error.exit_code)


def _quiet() -> None:
    """Libraries keep their progress bars and advice to themselves; ours is the output."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def default_out(model: str, recipe: str) -> Path:
    """./MODEL-RECIPE, MODEL being the last part of a path or hub name."""
    name = Path(model).expanduser()
    return Path(f"{(name.resolve() if model.startswith('.') else name).name or 'model'}-{recipe}")


@contextmanager
def kernels(strict: bool) -> Iterator[None]:
    """Strict selection of kernels where asked; a fallback is then a failed check."""
    if not strict:
        yield
        return
    from mambacompress.kernels import registry

    try:
        with registry.strict(True):
            yield
    except registry.KernelFallback as error:
        raise CheckFailed(str(error), "run `mambacompress doctor`, or leave --strict-kernels out") from error
