"""``mambacompress doctor``."""

from __future__ import annotations

import platform

import typer

from mambacompress.errors import CheckFailed


def _gpu() -> str:
    import torch

    from mambacompress.kernels import gpu

    if not torch.cuda.is_available():
        return "no GPU that torch can use: the Triton kernels are not checked here"
    device = torch.device("cuda", torch.cuda.current_device())
    why = gpu.obstacle(device, torch.float32, ())
    return f"GPU: {torch.cuda.get_device_name(device)}; " + (
        "its ops run in Triton" if why is None else f"its ops run in torch, because {why}")


def doctor() -> None:
    """Check this installation: versions, which kernels run here and why, every op against its reference.

    **Example**

    `mambacompress doctor`
    """
    from importlib.metadata import PackageNotFoundError, version

    from mambacompress import __version__
    from mambacompress.cli import render
    from mambacompress.kernels import registry

    typer.echo(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    typer.echo(f"mambacompress {__version__}")
    for name in ("torch", "transformers", "safetensors", "triton", "lm_eval"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    typer.echo(_gpu())
    results = registry.check_all()
    render.checks(results)
    wrong = [result.op for result in results if not result.ok]
    if wrong:
        raise CheckFailed(
            f"{', '.join(wrong)} disagree with their reference on this machine",
            "reinstall, or force the reference kernels and report the output above",
        )
    typer.echo(f"All {len(results)} ops agree with their reference.")
