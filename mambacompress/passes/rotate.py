"""Rotations: change the basis of a stream so that quantizers meet no outliers, without changing the function.

    R1  residual    embed <- embed R, W_in <- W_in R, W_out <- Rᵀ W_out, head <- head R          offline, free
    R5  dt_low      W_xdt <- Rᵀ W_xdt (rows), W_dt <- W_dt R                                      offline, free
    R2  out_proj    y <- y R at run time, W_out <- W_out R                                        online
    R6  x_proj      u <- u R at run time, W_x <- W_x R                                            online

R1 and R5 may be any orthogonal matrix (passes/bases.py); the online two must be fast: a Hadamard transform with random
signs, fused with the activation quantizer. R1's moment is what the readers see, the RMS-normalised residual without the
norm's weight, pooled over all blocks and the final norm (MambaQuant takes one layer); R5's is the uncentred moment of
dt_proj's input. A weightless norm on dt (FalconMamba) commutes with a rotation, though not with a scale.

R1 needs every block norm's weight folded away (fuse_norms). A tied head stays tied through T = R1ᵀ diag(g) R1 before it
(models/heads.py); ``untie`` gives it its own matrix instead. What passes an elementwise nonlinearity (the convolution,
the gate, the scan) is never rotated.

Sources: QuaRot (arXiv 2404.00456), MambaQuant (arXiv 2501.13484), Quamba2 (arXiv 2503.22879).

Legend: b batch, L tokens, D d_model, E d_inner, R dt_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.kernels.hadamard import largest_block
from mambacompress.models.heads import TransformedHead
from mambacompress.models.mixers import S6Mixer
from mambacompress.models.modelmap import RESIDUAL, Block, ModelMap, Site, set_module
from mambacompress.models.packed import OnlineHadamard
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.bases import orthogonal_basis
from mambacompress.schema import RotateConfig

_SMALLEST_ONLINE_BLOCK = 8
_OUT, _DT, _X = 0, 1, 2  # what a seed is for; further projections count on from _X


class Rotate(Pass):
    """See the module. R1 is model-wide (a float sweep where it is a KLT); R5, R2 and R6 are edits of one block.

    requires: passes that must come before, by name.
    """

    name = "rotate"
    rank = 30

    def __init__(self, config: RotateConfig) -> None:
        self.config = config
        self.needs_sweep = config.residual == "klt-hadamard"
        self.requires: tuple[str, ...] = () if config.residual == "none" else ("fuse_norms",)
        self.basis: Tensor | None = None
        self._moment: Tensor | None = None
        self._tokens = 0
        self._eps = 0.0

    # -- the plan ----------------------------------------------------------------------------------------------------

    def plan(self, model_map: ModelMap) -> Plan:
        plan = Plan()
        if self.config.residual != "none":
            self._plan_residual(model_map, plan)
        for block in model_map.blocks:
            self._plan_dt(block, plan)
            self._plan_online(block, plan)
        return plan

    def _plan_residual(self, model_map: ModelMap, plan: Plan) -> None:
        refused = model_map.residual.refuses.get("rotate")
        if refused:
            plan.refusals.append(Refusal(self.name, None, RESIDUAL, refused))
            return
        self._eps = _eps(model_map)
        D = model_map.residual.size
        what = f"R1 {self.config.residual}, {_described(self.config.residual, D)}"
        plan.edits.append(Edit(self.name, None, "embedding", what))
        for block in model_map.blocks:
            tensors = {site.tensor for site in (*block.readers(RESIDUAL), *block.writers(RESIDUAL))}
            plan.edits.append(Edit(self.name, block.index, ", ".join(sorted(tensors)), what))
        if not model_map.tied:
            plan.edits.append(Edit(self.name, None, "head", what))
        elif self.config.untie:
            vocabulary = model_map.head.weight.shape[0]
            plan.edits.append(Edit(self.name, None, "head", f"{what}; untied: {vocabulary} x {D} weights of its own"))
        else:
            plan.edits.append(Edit(self.name, None, "head", f"{what}; stays tied: R1ᵀ·diag(g)·R1 before it, "
                                   f"{D} x {D}, {4 * D * D:,} bytes in fp32, {D * D:,} multiply-adds a token",
                                   online=True))

    def _plan_dt(self, block: Block, plan: Plan) -> None:
        if self.config.dt == "none":
            return
        if "dt_low" not in block.streams:
            plan.refusals.append(Refusal(self.name, block.index, "dt_low", "this mixer has no low-rank dt"))
            return
        stream = block.streams["dt_low"]
        if not stream.allows("rotate"):
            plan.refusals.append(Refusal(self.name, block.index, "dt_low", stream.refuses["rotate"]))
            return
        plan.edits.append(Edit(self.name, block.index, "x_proj (dt), dt_proj",
                               f"R5 {self.config.dt}, {_described(self.config.dt, stream.size)}"))

    def _plan_online(self, block: Block, plan: Plan) -> None:
        for tensor, stream_name, label, wanted in (
                ("out_proj", "y", "R2", self.config.out), ("x_proj", "u", "R6", self.config.x)):
            if wanted == "none":
                continue
            reason = self._online_refusal(block, tensor)
            if reason is not None:
                plan.refusals.append(Refusal(self.name, block.index, tensor, reason))
                continue
            size = block.streams[stream_name].size
            adds = size * (largest_block(size) - 1).bit_length()
            plan.edits.append(Edit(self.name, block.index, tensor, f"{label} online hadamard on its input, "
                                   f"{_described('hadamard', size)}, about {adds:,} additions a token", online=True))

    def _online_refusal(self, block: Block, tensor: str) -> str | None:
        mixer = block.mixer
        if tensor == "x_proj" and not isinstance(mixer, S6Mixer):
            return "this mixer has no x_proj"
        stream = block.streams["y" if tensor == "out_proj" else "u"]
        if not stream.allows("online-rotate"):
            return stream.refuses["online-rotate"]
        if largest_block(stream.size) < _SMALLEST_ONLINE_BLOCK:
            return (f"{stream.size} channels split into Hadamard blocks of {largest_block(stream.size)} only, too "
                    "small to spread an outlier")
        return None

    def mixes(self) -> dict[str, str]:
        config = self.config
        found: dict[str, str] = {}
        if config.dt != "none":
            found |= {"x_proj": "R5 mixes its dt rows", "dt_proj": "R5 mixes its input channels"}
        if config.x != "none":
            found["x_proj"] = "R6 mixes its input channels"
        if config.out != "none":
            found["out_proj"] = "R2 mixes its input channels"
        if config.residual != "none":
            channels = "R1 mixes its input channels"
            found |= {"in_proj": channels, "out_proj": "R1 mixes its rows", "head": channels}
        return found

    # -- R1: the model -----------------------------------------------------------------------------------------------

    def observe(self, hidden_BLD: Tensor) -> None:
        if not self.needs_sweep:
            return
        wide = hidden_BLD.dtype if hidden_BLD.dtype == torch.float64 else torch.float32
        h_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]).to(wide)
        h_TD = h_TD * torch.rsqrt(h_TD.square().mean(-1, keepdim=True) + self._eps)
        product_DD = (h_TD.T @ h_TD).double().cpu()
        self._moment = product_DD if self._moment is None else self._moment.add_(product_DD)
        self._tokens += h_TD.shape[0]

    def prepare(self, model_map: ModelMap) -> None:
        if self.config.residual == "none" or not model_map.residual.allows("rotate"):
            return
        moment = None
        if self.needs_sweep:
            if self._moment is None or not self._tokens:
                raise UserError("the residual's KLT has seen no calibration text",
                                "give --text, or use residual: hadamard")
            moment = self._moment / self._tokens
        self.basis = orthogonal_basis(self.config.residual, model_map.residual.size, self.config.seed, moment)
        self._moment = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.basis is None else {"residual": self.basis}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.basis = state.get("residual")

    def enter_embedding(self, model_map: ModelMap) -> None:
        if self.basis is None:
            return
        embedding = model_map.embedding
        if model_map.tied and self.config.untie:
            own = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
            model_map.head.module.weight = own
            model_map.tied = False
            host: Any = model_map.host
            host.config.tie_word_embeddings = False
        embedding.rotate_output(self._on(embedding))
        model_map.basis = self.basis

    def enter_block(self, block: Block) -> None:
        if self.basis is None:
            return
        weight = getattr(block.norm, "weight", None)
        if weight is not None and not torch.all(weight == 1):
            raise UserError(f"block {block.index}: the norm's weight is not folded, so its readers see another space "
                            "than the one to rotate", "put fuse_norms before rotate")
        for site in block.readers(RESIDUAL):
            site.rotate_input(self._on(site))
        for site in block.writers(RESIDUAL):
            site.rotate_output(self._on(site))

    def enter_head(self, model_map: ModelMap) -> None:
        if self.basis is None:
            return
        head, weight_D = model_map.head, model_map.final_norm.get_parameter("weight")
        gamma_D = weight_D.data.reshape(-1).double()
        R = self._on(head)
        weight_D.data = torch.ones_like(weight_D.data)
        if not model_map.tied:
            head.scale_input(gamma_D)
            head.rotate_input(R)
            return
        if torch.all(gamma_D == 1):  # T would be the identity
            return
        weight = head.weight
        transform = (R.T @ (gamma_D[:, None] * R)).to(weight.dtype)
        set_module(model_map.host, head.path, TransformedHead(*weight.shape, transform=transform, weight=weight))

    def _on(self, site: Site) -> Tensor:
        if self.basis is None:
            raise ValueError("no basis before prepare or load_state")
        return self.basis.to(site.weight.device)

    # -- R5, R2, R6: one block ---------------------------------------------------------------------------------------

    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        done: dict[str, Any] = {}
        stream = block.streams.get("dt_low")
        if self.config.dt != "none" and stream is not None and stream.allows("rotate"):
            done |= self._rotate_dt(block, calibration)
        if self.config.x != "none" and self._online_refusal(block, "x_proj") is None:
            projections = list(dict.fromkeys(path.projection for path in block.mixer.paths))  # type: ignore[union-attr]
            for i, projection in enumerate(projections):
                readers = [site for site in block.readers("u") if site.module is projection.x_proj]
                projection.x_rotation = self._online(block, readers, _X + i)
            done["x"] = "hadamard"
        if self.config.out != "none" and self._online_refusal(block, "out_proj") is None:
            block.mixer.out_rotation = self._online(block, block.readers("y"), _OUT)
            done["out"] = "hadamard"
        return done

    def _rotate_dt(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        """R5: one basis a block, from the moment of dt_proj's input over all paths."""
        moment: list[Tensor] = []

        def observe(tap: str, value: Tensor) -> None:
            if tap == "dt_proj":
                x_TR = value.reshape(-1, value.shape[-1]).double()
                product_RR = x_TR.T @ x_TR
                moment[:] = [moment[0] + product_RR] if moment else [product_RR]

        size, kind = block.streams["dt_low"].size, self.config.dt
        if kind == "klt-hadamard":
            calibration.run(block, observe)
        R = orthogonal_basis(kind, size, self._seed(block, _DT), moment[0] if moment else None)
        for site in block.writers("dt_low"):
            site.rotate_output(R.to(site.weight.device))
        for site in block.readers("dt_low"):
            site.rotate_input(R.to(site.weight.device))
        if not moment:
            return {"dt": kind}
        rms_R = moment[0].diagonal().sqrt()
        return {"dt": kind, "dt_rms_ratio": float(f"{(rms_R.max() / rms_R.min().clamp_min(1e-30)).item():.4g}")}

    def _online(self, block: Block, readers: list[Site], role: int) -> OnlineHadamard:
        """The online transform before ``readers`` (the rows of one matrix), undone in their weights."""
        size = readers[0].shape[1]
        rotation = OnlineHadamard(size, seed=self._seed(block, role), block=largest_block(size))
        rotation.to(readers[0].weight.device)
        for site in readers:
            site.set(rotation(site.get()))  # W R, by the fast transform in fp64
        return rotation

    def _seed(self, block: Block, role: int) -> int:
        """A seed of its own for every transform of the model."""
        return (self.config.seed * 1_000_003 + block.index * 101 + role) % (1 << 31)


def _eps(model_map: ModelMap) -> float:
    """The eps of the norms that read the residual; raises UserError where the residual cannot be rotated."""
    norms = [(f"{block.path}.norm", block.norm) for block in model_map.blocks]
    norms.append((model_map.final_norm_path, model_map.final_norm))
    seen: dict[int, str] = {}
    for path, norm in norms:
        if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
            raise UserError(f"{path} is a {type(norm).__name__}: it subtracts the mean or adds a bias, which does not "
                            "commute with a rotation", "set rotate.residual to none")
        other = seen.setdefault(id(getattr(norm, "weight", norm)), path)
        if other != path:
            raise UserError(f"{path} and {other} are one norm: its weight cannot be folded, nor the residual rotated",
                            "untie them first, or set rotate.residual to none")
    values = {float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5) or 1e-5)) for _, norm in norms}
    return max(values)


def _described(kind: str, size: int) -> str:
    """The size of a basis in words: what of it is a Hadamard matrix."""
    if kind == "random":
        return f"{size} channels"
    block = largest_block(size)
    return f"{size} channels" if block == size else f"{size} channels in {size // block} Hadamard blocks of {block}"


__all__ = ["Rotate"]
