"""One process of sparse training runs: ``python sparse_process.py OUT WRAPPER:METHOD ... fsdp1``.

WRAPPER: ``trainer`` (the package's, on accelerate: DistributedDataParallel where there are two processes) or ``loop``,
a loop of its own, under ``fully_shard`` where there are several. The process reads its rank from the environment and
prints, as one line of JSON, for each of them its losses and a digest of all masks, in whole rows, after every step, and
of the zeros at the end; for ``fsdp1`` what is said to it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import mambacompress as mc
from mambacompress.training import lm
from tests.conftest import _host

STEPS = 6
RUN = {"steps": STEPS, "batch": 4, "length": 12, "warmup": 1, "learning_rate": 5e-3, "precision": "fp32",
       "interval": 2}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + whole(tensors[name]).to(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def tokens() -> Tensor:
    return torch.randint(1, 97, (600,), generator=torch.Generator().manual_seed(5))


def by_trainer(model: Any, session: mc.Session, out: Path) -> tuple[list[float], list[str]]:
    losses, masks = [], []
    for row in lm.train(model, tokens(), session.training.run(), out, method=session):
        losses.append(row["loss"])
        masks.append(digest({name: layer.mask for name, layer in session.layers.items()}))
    return losses, masks


def by_loop(model: Any, session: mc.Session) -> tuple[list[float], list[str]]:
    """Each process on its share of every batch."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.backbone.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = session.optimizer(5e-3)
    losses, masks = [], []
    for step in range(STEPS):
        batch_BL = tokens()[step * 48:(step + 1) * 48].reshape(4, 12)
        share = len(batch_BL) // world
        mine_BL = batch_BL[rank * share:(rank + 1) * share]
        loss = lm.token_loss(model, mine_BL, session)
        loss.backward()
        optimizer.step()
        session.step(optimizer)
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
        found = {name: layer.mask for name, layer in session.layers.items()}
        if world > 1:
            assert all(isinstance(mask, DTensor) for mask in found.values())
            assert all(mask.placements == session.layers[name].weight.placements for name, mask in found.items())
        masks.append(digest(found))
    return losses, masks


def overrides(method: str) -> dict[str, Any]:
    return {"training.method": method} | {f"training.{name}": value for name, value in RUN.items()}


def result(wrapper: str, method: str, out: Path) -> dict[str, Any]:
    """What a run looks like from this process."""
    model = _host("mamba")
    with mc.attach(model, "nm-2of4", overrides=overrides(method)) as session:
        losses, masks = by_loop(model, session) if wrapper == "loop" else by_trainer(model, session, out / method)
    zeros = {name: (whole(p) == 0) for name, p in model.named_parameters()
             if name.endswith(("in_proj.weight", "out_proj.weight"))}
    with torch.no_grad():
        after = model(input_ids=tokens()[:48].reshape(4, 12), use_cache=False).logits
    share = torch.cat([z.flatten() for z in zeros.values()]).float().mean()
    return {"losses": losses, "masks": [*masks, digest(zeros)], "zeros": float(share),
            "after": float(after.double().square().mean())}


def refusals() -> list[str]:
    """What a session says of a model flattened after attach, and of one flattened before."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = _host("mamba")
    session = mc.attach(model, "nm-2of4", overrides=overrides("sr-ste"))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    messages = []
    for attempt in (session.step, lambda: mc.attach(wrapped, "nm-2of4")):
        try:
            attempt()
        except mc.UserError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    folder, *runs = sys.argv[1:]
    print(json.dumps({run: refusals() if run == "fsdp1" else result(*run.split(":"), Path(folder)) for run in runs}))
