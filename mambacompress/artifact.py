"""The artifact: a Hugging Face directory that holds packed weights and everything needed to run and to check them.

    config.json          the host's configuration, quantization_config.quant_method = "mambacompress"
    *.safetensors        packed codes, scales and what stayed float, under the host's own module paths
    mambacompress.json   the manifest: schema version, layout, per-layer records, coverage, source, versions, file
    hashes recipe.yaml, README.md (model card), tokenizer files

The *layout* lists every module that is not what adoption builds, as its ``spec()``; loading builds the adopted host on
the meta device, puts those modules in place and loads every tensor strictly by name. Nothing is unpickled.

Without this package the directory must fail loudly, not load random weights: the final norm's weight is stored as [1,
D], which broadcasts to the same function here and raises a shape mismatch in stock transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mambacompress import storage
from mambacompress.errors import CheckFailed, UserError
from mambacompress.kernels import native
from mambacompress.models import heads, mixers, packed
from mambacompress.models.families import adopt
from mambacompress.models.families.checkpoint import empty_host, generation_config, read_config
from mambacompress.models.modelmap import ModelMap, set_module
from mambacompress.models.packed import HeadParts, SparseWeight
from mambacompress.storage import StoredTensor

SCHEMA_VERSION = 1
MANIFEST = "mambacompress.json"
METHOD = "mambacompress"
_SHARD_BYTES = 512 << 20
_DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
           "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def is_artifact(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def layout_of(module: nn.Module, path: str, stock: nn.Module) -> dict[str, dict[str, Any]]:
    """Full path -> spec of every module below ``module`` that differs from the adopted ``stock`` module at that
    place."""
    usual = {name: child.spec() for name, child in stock.named_modules() if hasattr(child, "spec")}
    found: dict[str, dict[str, Any]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if hasattr(child, "spec") and child.spec() != usual.get(name):
            found[f"{path}.{name}" if name else path] = child.spec()
    return found


def build(spec: dict[str, Any]) -> nn.Module:
    """The module a layout entry describes, on the current default device."""
    rooms = {"DepthwiseConv": mixers, "Gate": mixers, "ScanQuantizer": mixers, "TransformedHead": heads}
    return rooms.get(spec["type"], packed).build(spec)


def skeleton(config: Any, layout: dict[str, dict[str, Any]]) -> ModelMap:
    """The host of an artifact on the meta device: adopted, with every module of the layout in place."""
    model_map = dress(empty_host(config, prove=False).host, layout)
    share_head(model_map)
    return model_map


def dress(host: Any, layout: dict[str, dict[str, Any]]) -> ModelMap:
    """Adopt a host on the meta device and put every module of the layout in place."""
    model_map = adopt(host, prove=False)
    with torch.device("meta"):
        for path, spec in sorted(layout.items()):
            set_module(host, path, build(spec))
    norm: Any = model_map.final_norm
    norm.weight = nn.Parameter(norm.weight.detach()[None], requires_grad=False)
    for parameter in host.parameters():
        parameter.requires_grad_(False)
    return model_map


def share_head(model_map: ModelMap) -> None:
    """Make a tied head read the embedding's own tensors."""
    if not model_map.tied:
        return
    if isinstance(model_map.head.module, HeadParts):
        # transformers ties parameters, and a packed head shares buffers: what it would tie is not there.
        model_map.host.all_tied_weights_keys = {}
    head: Any = model_map.head.module
    embedding = model_map.embedding.module
    if hasattr(head, "tie"):
        head.tie(embedding)
    else:
        head.weight = embedding.weight


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its schema version checked."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a mambacompress artifact: it holds no {MANIFEST}",
            "name the output directory of `mambacompress quantize`",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}", "copy the artifact again or rerun the compression") from error
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{directory} was written by a newer mambacompress (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION})",
            "upgrade mambacompress",
        )
    return manifest


def load(directory: str | Path, device: str = "cpu") -> Any:
    """The compressed model, ready to run: a transformers model whose mixers multiply packed weights.

    Raises UserError for anything missing, truncated, renamed or of another schema, CheckFailed for a sparse weight
    that is not of its pattern.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    model_map = skeleton(read_config(directory), manifest["layout"])
    streams = torch.device(device).type == "cpu" and native.library() is not None
    load_tensors(model_map.host, tensor_files(directory, manifest), streams=streams)
    host = model_map.host.to(device)
    share_head(model_map)  # moving copies a shared buffer twice
    packed.rearrange(host)
    host.eval()
    host.generation_config = generation_config(directory, host)
    return host


def tensor_files(directory: Path, manifest: dict[str, Any]) -> list[Path]:
    """The artifact's weight files, in order; raises UserError where one is missing."""
    names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} misses {', '.join(missing)}", "copy the artifact again")
    return [directory / name for name in names]


def load_tensors(host: nn.Module, files: list[Path], *, streams: bool = False) -> None:
    """Fill a skeleton strictly: every tensor it expects, nothing else, shapes and dtypes as stored.

    All of them lie in one memory, in the skeleton's order, each read straight to its place: no file stays mapped, and
    no more than the tensors themselves is ever held. streams: of sparse weights the place is that of the stream that
    native code reads, and values and positions go there a weight at a time.
    """
    expected = dict(host.state_dict(keep_vars=True))
    owners: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        owners.setdefault(id(tensor), []).append(name)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with _damage(file):
            stored |= storage.stored_tensors(file)
    for name, entry in stored.items():
        if name not in expected:
            raise UserError(f"{entry.file.name} holds {name!r}, which this model has no place for",
                            "the artifact and its manifest do not belong together: copy it again")
        if entry.shape != tuple(expected[name].shape) or entry.dtype not in _DTYPES:
            raise UserError(f"{name!r} has shape {list(entry.shape)} of {entry.dtype}, expected "
                            f"{list(expected[name].shape)}", "the artifact is damaged: copy it again")
    seen = {place for name in stored for place in owners[id(expected[name])]}
    missing = sorted(set(expected) - seen)
    if missing:
        raise UserError(f"the artifact lacks {len(missing)} tensors, the first is {missing[0]!r}",
                        "copy the artifact again")
    names = [name for name in expected if name in stored]
    sparse = _streamed(host, names) if streams else {}
    places = native.places([_room(name, stored[name].size, sparse.get(name)) for name in names])
    for name, memory in zip(names, places, strict=True):
        entry, module = stored[name], sparse.get(name)
        held = memory if module is None else torch.empty(entry.size, dtype=torch.uint8)
        with _damage(entry.file):
            entry.read_into(held.numpy().data)
        tensor = held.view(_DTYPES[entry.dtype]).view(entry.shape)
        for place in owners[id(expected[name])]:
            _place(host, place, tensor)
        if module is not None and module.tileable():  # values and positions are both there
            _check_pattern(name.rpartition(".")[0], module)
            module.tile(memory)
            for place in owners[id(expected[name])]:
                host.get_submodule(place.rpartition(".")[0]).share(module)  # type: ignore[operator]


def _streamed(host: nn.Module, names: list[str]) -> dict[str, SparseWeight]:
    """Of these tensors the values and positions of sparse weights -> the module whose stream takes them in."""
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = host.get_submodule(path)
        if isinstance(module, SparseWeight) and leaf in ("values", module.form):
            found[name] = module
    return found


def _room(name: str, size: int, module: SparseWeight | None) -> int:
    """Bytes that stay of a tensor of that size: of a sparse weight, those of its stream where its positions are."""
    if module is None:
        return size
    return module.stream_bytes() if name.endswith(f".{module.form}") else 0


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """What goes wrong in reading a file of the artifact, in the user's words."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged: {error}", "copy the artifact again") from error


def _place(host: nn.Module, name: str, tensor: Tensor) -> None:
    parent_path, _, leaf = name.rpartition(".")
    parent = host.get_submodule(parent_path)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor


# -- writing ---------------------------------------------------------------------------------------------------------


def assemble(parts: list[Path], directory: Path) -> list[str]:
    """Merge part files (one a block) into shards of at most 512 MiB; returns the shard names.

    Tensors are memory-mapped from the parts, so no more than one shard is in memory.
    """
    handles = [safe_open(part, framework="pt") for part in parts]
    sizes = {name: (handle, _nbytes(handle, name)) for handle in handles for name in handle.keys()}  # noqa: SIM118
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name][1] > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name][1]
    total = len(shards)
    names = (
        ["model.safetensors"] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    )
    for file, members in zip(names, shards, strict=True):
        storage.write_tensors(directory / file, {name: sizes[name][0].get_tensor(name) for name in members})
    if total > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sum(size for _, size in sizes.values())}, "weight_map": weight_map}
        storage.write_json(directory / "model.safetensors.index.json", index)
        names.append("model.safetensors.index.json")
    return names


def _nbytes(handle: Any, name: str) -> int:
    piece = handle.get_slice(name)
    count = 1
    for size in piece.get_shape():
        count *= size
    return count * _DTYPES[piece.get_dtype()].itemsize


def finish(directory: Path, manifest: dict[str, Any], files: list[str]) -> None:
    """Hash the files and write the manifest last: a directory without one is not an artifact."""
    hashes = {
        name: {"sha256": storage.sha256_file(directory / name), "bytes": (directory / name).stat().st_size}
        for name in sorted(files)
    }
    storage.write_json(directory / MANIFEST, {**manifest, "schema_version": SCHEMA_VERSION, "files": hashes})


# -- checking --------------------------------------------------------------------------------------------------------


def verify(directory: str | Path) -> dict[str, Any]:
    """Recompute hashes, coverage and N:M patterns from the files themselves; raises CheckFailed naming the first thing
    that is wrong.

    Returns the counted figures: files, bytes, coverage, packed layers; patterns by layer, their weights and zeros.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, stated in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckFailed(f"{name} is missing", "copy the artifact again")
        if file.stat().st_size != stated["bytes"]:
            raise CheckFailed(
                f"{name} has {file.stat().st_size} bytes, the manifest says {stated['bytes']}",
                "the file is truncated or was edited: copy the artifact again",
            )
        if storage.sha256_file(file) != stated["sha256"]:
            raise CheckFailed(f"{name} does not have the content it was saved with", "the file was damaged or edited")
    host = load(directory)
    counted = coverage_of(host, manifest["float_bytes"])
    if abs(counted - manifest["coverage"]) > 1e-9:
        raise CheckFailed(
            f"coverage counted from the tensors is {counted:.4f}, the manifest says {manifest['coverage']:.4f}",
            "the manifest was edited: rerun the compression",
        )
    sparse = _sparse_weights(host)
    for name, module in sparse.items():
        _check_pattern(name, module)
    for name, tensor in host.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckFailed(f"tensor {name!r} holds NaN or Inf", "rerun the compression")
    return {
        "files": len(manifest["files"]),
        "bytes": sum(f["bytes"] for f in manifest["files"].values()),
        "coverage": counted,
        "packed": sum(isinstance(m, packed.PACKED) for m in host.modules()),
        "patterns": {name: str(module.pattern) for name, module in sparse.items()},
        "zeros": sum(int((module.codes() == 0).sum()) for module in sparse.values()),
        "sparse_weights": sum(module.rows * module.columns for module in sparse.values()),
    }


def _check_pattern(name: str, module: SparseWeight) -> None:
    wrong = module.excess()
    if wrong:
        raise CheckFailed(f"{name} is not {module.pattern}: {wrong:,} of its groups do not keep {module.pattern.keep} "
                          "weights", "the file was edited: rerun the compression")


def _sparse_weights(host: nn.Module) -> dict[str, SparseWeight]:
    """Every sparse weight by the name of its module, a tied one once."""
    found: dict[int, tuple[str, SparseWeight]] = {}
    for name, module in host.named_modules():
        if isinstance(module, SparseWeight):
            held = module.values if module.stream is None else module.stream
            found.setdefault(held.data_ptr(), (name, module))
    return dict(found.values())


def coverage_of(host: nn.Module, float_bytes: dict[str, int]) -> float:
    """Share of the bytes of all matrices (as they were in float) whose module is now packed."""
    covered = sum(size for path, size in float_bytes.items() if isinstance(host.get_submodule(path), packed.PACKED))
    return covered / max(1, sum(float_bytes.values()))
