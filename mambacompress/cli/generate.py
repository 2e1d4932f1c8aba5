"""``mambacompress generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from mambacompress.cli.command import Device, StrictKernels, kernels


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model or a compressed directory, a hub name, or demo.")
    ] = "demo",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest of this mass.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    state: Annotated[str, typer.Option(help="Of the recurrent states: fp32, or int8 rounded at every step.")] = "fp32",
    device: Device = "cpu",
    strict_kernels: StrictKernels = False,
) -> None:
    """Continue a prompt, printing as it goes.

    **Examples**

    `mambacompress generate demo-w8a8 --prompt "def main(" -n 100`

    `mambacompress generate ./mamba-130m -p "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1`
    """
    import mambacompress as mc

    with kernels(strict_kernels):
        loaded = mc.load(model, device=device)
        typer.echo(prompt, nl=False)
        for piece in mc.generate(
            loaded, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, state=state
        ):
            typer.echo(piece, nl=False)
    typer.echo()
