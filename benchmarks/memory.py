"""Peak memory of compressing a model much larger than the memory it may take.

    python -m benchmarks.memory FOLDER [--layers 64] [--width 2560] [--recipe w8a8]

Writes a random Mamba-1 checkpoint (sharded bf16 safetensors, by default the shape of mamba-2.8b) into FOLDER,
compresses it in a process of its own on random token ids, and samples that process's anonymous resident memory
(RssAnon; mapped files are the page cache's). Prints the peak and the wall time as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mambacompress.bench.memory import anonymous_bytes

_RUN = """
import sys, torch
import mambacompress as mc
source, recipe, out, sequences, length, vocabulary = sys.argv[1:7]
tokens = torch.randint(1, int(vocabulary), (int(sequences), int(length)), generator=torch.Generator().manual_seed(0))
mc.quantize(source, recipe, calibration=tokens, out=out, overrides=["checks.max_perplexity_ratio=null"],
            progress=lambda *stage: print(*stage, file=sys.stderr, flush=True))
"""


def write_checkpoint(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """A random bf16 Mamba-1 checkpoint, a shard a few layers; returns its parameters."""
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=True)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    E, N, R, K = config.intermediate_size, config.state_size, int(config.time_step_rank), config.conv_kernel

    def normal(*shape: int, spread: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * spread).bfloat16()

    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(-1, layers):
        if layer < 0:
            tensors = {"backbone.embeddings.weight": normal(vocabulary, width, spread=0.02),
                       "backbone.norm_f.weight": torch.ones(width).bfloat16()}
        else:
            here = f"backbone.layers.{layer}"
            A_log = torch.log(torch.arange(1, N + 1).float()).expand(E, N).contiguous().bfloat16()
            tensors = {
                f"{here}.norm.weight": torch.ones(width).bfloat16(),
                f"{here}.mixer.in_proj.weight": normal(2 * E, width, spread=width**-0.5),
                f"{here}.mixer.conv1d.weight": normal(E, 1, K, spread=0.3),
                f"{here}.mixer.conv1d.bias": torch.zeros(E).bfloat16(),
                f"{here}.mixer.x_proj.weight": normal(R + 2 * N, E, spread=E**-0.5),
                f"{here}.mixer.dt_proj.weight": normal(E, R, spread=R**-0.5),
                f"{here}.mixer.dt_proj.bias": torch.full((E,), -4.0).bfloat16(),
                f"{here}.mixer.A_log": A_log, f"{here}.mixer.D": torch.ones(E).bfloat16(),
                f"{here}.mixer.out_proj.weight": normal(width, E, spread=E**-0.5 / math.sqrt(layers)),
            }
        file = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    source, out = options.folder / "random", options.folder / "out"
    source.mkdir(parents=True, exist_ok=True)
    parameters = write_checkpoint(source, options.layers, options.width, options.vocabulary)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
    began = time.perf_counter()
    command = [sys.executable, "-c", _RUN, source, options.recipe, out, options.sequences, options.length,
               options.vocabulary]
    process = subprocess.Popen([str(part) for part in command])
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid) or 0)
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors")) if out.is_dir() else 0
    print(json.dumps({"parameters": parameters, "recipe": options.recipe, "tokens": options.sequences * options.length,
                      "exit": process.returncode, "peak_anonymous_bytes": peak, "seconds": round(seconds, 1),
                      "source_bytes": 2 * parameters, "stored_bytes": stored, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
