"""Hard twins: models with the same function as a given Mamba-1 or Mamba-2, and far harder to quantize.

Smoothing and rotation undo what a model's training happened to do to its channels. To see whether they do, we do the
worst ourselves, by the same exact folds read backwards, and ask for the original's figures back:

    norm-dt     Mamba-1, stock form: inverse S1 (gamma * s, in_proj columns / s) and inverse S5 (x_proj's dt rows * s,
                dt_proj columns / s), s log-normal
    norm-gate   Mamba-2, stock form: inverse S1, and inverse S2' (the gated norm's gamma * s, out_proj columns / s): the
                inputs of both of its linears, and they are all it has
    eigenbasis  both, stock form, head untied: the residual rotated into its own eigenbasis and, of a Mamba-1, dt_low
                into its own, so that energy sits in few channels; norm weights are folded into their readers first
    gate-conv   Mamba-1, our form (activations x * sigmoid(x / s)): inverse S2 (gate rows * s, out_proj columns / s) and
                inverse S3 (conv * s, x_proj and out_proj columns / s), s log-normal

All folds are computed in fp64 on an fp64 model; the function agrees to 1e-10 (tested). Those in stock form are saved as
ordinary Hugging Face directories, rounded to fp32 once.

    python -m benchmarks.twins MODEL_DIR --kind eigenbasis --seed 0 --text FILE --out DIR

Legend: S sequences, L tokens, D d_model, E d_inner, R dt_rank.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.windows import load_tokenizer, windows

FAMILIES = {"mamba": ("norm-dt", "eigenbasis", "gate-conv"), "mamba2": ("norm-gate", "eigenbasis")}  # kinds of each
KINDS = tuple(dict.fromkeys(kind for kinds in FAMILIES.values() for kind in kinds))
STOCK_KINDS = tuple(kind for kind in KINDS if kind != "gate-conv")
SIGMA = 1.5
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def load_double(model_dir: str | Path) -> Any:
    """The stock transformers model of a directory, in fp64 and eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_dir), local_files_only=True).double().eval()


def make_twin(host: Any, kind: str, *, seed: int = 0, sigma: float = SIGMA, tokens_SL: Tensor | None = None) -> Any:
    """A twin of a stock fp64 MambaForCausalLM or Mamba2ForCausalLM; ``host`` itself is left alone.

    kind: one of the family's in FAMILIES. sigma: spread of the log-normal factors. tokens_SL: int64 token ids, from
    which ``eigenbasis`` takes the moments. ``gate-conv`` returns an adopted model (our mixers). Raises ValueError for a
    kind that is unknown or of the other family, a model that is no stock fp64 Mamba, or missing tokens.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown twin {kind!r}; known: {', '.join(KINDS)}")
    family = getattr(host.config, "model_type", None)
    if family not in FAMILIES or host.dtype != torch.float64:
        raise ValueError("a twin is made of a stock Mamba-1 or Mamba-2 in fp64 (load_double)")
    if kind not in FAMILIES[family]:
        raise ValueError(f"a {family} has no {kind} twin; it has {', '.join(FAMILIES[family])}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if kind == "eigenbasis":
            if tokens_SL is None:
                raise ValueError("the eigenbasis twin needs tokens to take the moments from")
            return rotate_into_eigenbases(untied(host), generator, *moments(host, tokens_SL))
        scale = {"norm-dt": scale_norm_and_dt, "norm-gate": scale_norm_and_gate, "gate-conv": scale_gate_and_conv}[kind]
        return scale(copy.deepcopy(host), generator, sigma)


def save_twin(twin: Any, out: str | Path, tokenizer_from: str | Path) -> Path:
    """Save a stock-form twin as a Hugging Face directory in fp32, with the tokenizer of another directory."""
    target = Path(out)
    twin.float().save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file():
            shutil.copyfile(Path(tokenizer_from) / name, target / name)
    return target


def log_normal(count: int, generator: torch.Generator, sigma: float) -> Tensor:
    """exp(sigma * n) with standard normal n, fp64 [count]."""
    return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))


def scale_norm_and_dt(host: Any, generator: torch.Generator, sigma: float) -> Any:
    """Inverse S1 and S5 on every layer, in place."""
    for layer in host.backbone.layers:
        mixer = layer.mixer
        s_D = log_normal(layer.norm.weight.numel(), generator, sigma)
        layer.norm.weight.mul_(s_D)
        mixer.in_proj.weight.div_(s_D)
        s_R = log_normal(mixer.dt_proj.weight.shape[1], generator, sigma)
        mixer.x_proj.weight[: len(s_R)].mul_(s_R[:, None])
        mixer.dt_proj.weight.div_(s_R)
    return host


def scale_norm_and_gate(host: Any, generator: torch.Generator, sigma: float) -> Any:
    """Inverse S1 and S2' on every layer of a Mamba-2, in place."""
    for layer in host.backbone.layers:
        mixer = layer.mixer
        for norm, reader in ((layer.norm, mixer.in_proj), (mixer.norm, mixer.out_proj)):
            s = log_normal(norm.weight.numel(), generator, sigma)
            norm.weight.mul_(s)
            reader.weight.div_(s)
    return host


def scale_gate_and_conv(host: Any, generator: torch.Generator, sigma: float) -> Any:
    """Inverse S2 and S3 on every layer of the adopted model, in place.

    With z' = s z: y z' sigmoid(z' / s) = s (y SiLU(z)), which out_proj's columns take back. The same holds for the
    convolution: from there to out_proj all is linear in u, channel by channel, but for dt, B, C: x_proj takes s back.
    """
    from mambacompress.models.families import adopt

    for block in adopt(host).blocks:
        mixer: Any = block.mixer
        E = mixer.d_inner
        z_E, u_E = log_normal(E, generator, sigma), log_normal(E, generator, sigma)
        mixer.in_proj.weight[E:].mul_(z_E[:, None])
        mixer.conv.weight.mul_(u_E[:, None])
        for parameter, s_E in ((mixer.conv.bias, u_E), (mixer.in_proj.bias, torch.cat([torch.ones_like(z_E), z_E]))):
            if parameter is not None:
                parameter.mul_(s_E)
        mixer.gate.scale, mixer.conv.act_scale = 1 / z_E, 1 / u_E
        for path in mixer.paths:
            path.projection.x_proj.weight.div_(u_E)
        mixer.out_proj.weight.div_(z_E * u_E)
    return host


def untied(host: Any) -> Any:
    """A copy of a stock model whose head is a matrix of its own."""
    config = copy.deepcopy(host.config)
    config.tie_word_embeddings = False
    copied = type(host)(config).to(host.dtype).eval()
    state = dict(host.state_dict())
    if host.config.tie_word_embeddings:
        state["lm_head.weight"] = host.get_input_embeddings().weight
    copied.load_state_dict(state)
    return copied


def moments(host: Any, tokens_SL: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Second moments of the residual stream [D, D] and of every layer's dt_low [R, R] (none in a Mamba-2), uncentred,
    fp64.

    The residual is what its readers see before their weight: RMS-normalised, pooled over all blocks and the final norm.
    Raises RuntimeError where a stock mixer does not call the modules that are watched.
    """
    layers, eps = host.backbone.layers, host.config.layer_norm_epsilon
    projections = [layer.mixer.x_proj for layer in layers if hasattr(layer.mixer, "x_proj")]
    norms = [layer.norm for layer in layers] + [host.backbone.norm_f]
    seen: dict[int, Tensor] = {}

    def watch_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h_nD = inputs[0].double().flatten(0, -2)
        h_nD = h_nD * torch.rsqrt(h_nD.square().mean(-1, keepdim=True) + eps)
        seen[id(module)] = h_nD.T @ h_nD / len(h_nD)

    def watch_x_proj(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dt_nR = output.double().flatten(0, -2)[:, : int(host.config.time_step_rank)]
        seen[id(module)] = dt_nR.T @ dt_nR / len(dt_nR)

    handles = [norm.register_forward_pre_hook(watch_norm) for norm in norms]
    handles += [projection.register_forward_hook(watch_x_proj) for projection in projections]
    try:
        with torch.no_grad():
            host(tokens_SL)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(norms) + len(projections):
        raise RuntimeError("this version of transformers does not call the modules whose inputs are watched")
    residual = torch.stack([seen[id(norm)] for norm in norms]).mean(0)
    return residual, [seen[id(projection)] for projection in projections]


def eigenbasis(moment_nn: Tensor, generator: torch.Generator) -> Tensor:
    """The eigenvectors of a second moment as columns, in random order and with random signs: orthogonal, fp64."""
    vectors = torch.linalg.eigh(moment_nn.double())[1]
    count = len(vectors)
    signs = torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
    return vectors[:, torch.randperm(count, generator=generator)] * signs


def rotate_into_eigenbases(host: Any, generator: torch.Generator, residual_DD: Tensor, dt_RR: Sequence[Tensor]) -> Any:
    """Fold every norm into its readers and rotate the residual and each dt_low into their eigenbases, in place.

    The head must not be tied: it takes the final norm's weight and the rotation.
    """
    Q_DD = eigenbasis(residual_DD, generator)
    backbone = host.backbone
    backbone.embeddings.weight.copy_(backbone.embeddings.weight @ Q_DD)
    for index, layer in enumerate(backbone.layers):
        mixer = layer.mixer
        mixer.in_proj.weight.copy_(mixer.in_proj.weight * layer.norm.weight @ Q_DD)
        layer.norm.weight.fill_(1.0)
        mixer.out_proj.weight.copy_(Q_DD.T @ mixer.out_proj.weight)
        if mixer.out_proj.bias is not None:
            mixer.out_proj.bias.copy_(mixer.out_proj.bias @ Q_DD)
        if dt_RR:
            Q_RR = eigenbasis(dt_RR[index], generator)
            R = len(Q_RR)
            mixer.x_proj.weight[:R].copy_(Q_RR.T @ mixer.x_proj.weight[:R])
            mixer.dt_proj.weight.copy_(mixer.dt_proj.weight @ Q_RR)
    host.lm_head.weight.copy_(host.lm_head.weight * backbone.norm_f.weight @ Q_DD)
    backbone.norm_f.weight.fill_(1.0)
    return host


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.twins", description="Write a hard twin of a Mamba")
    parser.add_argument("model", help="a transformers Mamba-1 or Mamba-2 directory")
    parser.add_argument("--kind", choices=STOCK_KINDS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    parser.add_argument("--text", help="text for the moments of eigenbasis; its windows go by the seed")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    tokens_SL = None if options.text is None else moment_tokens(options.model, options.text, options.seed)
    host = load_double(options.model)
    twin = make_twin(host, options.kind, seed=options.seed, sigma=options.sigma, tokens_SL=tokens_SL)
    print(save_twin(twin, options.out, options.model))


def moment_tokens(model_dir: str | Path, text: str | Path, seed: int, count: int = 8, length: int = 512) -> Tensor:
    """``count`` windows of a text, others for every seed: int64 [count, length]."""
    found = windows(load_tokenizer(model_dir), text, length, count * (seed + 1))
    return torch.from_numpy(found[-count:])


if __name__ == "__main__":
    main()
