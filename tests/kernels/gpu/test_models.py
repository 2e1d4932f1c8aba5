"""Whole models on Triton kernels alone: every op they call has one, and they say what the references say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mambacompress.kernels import gpu

CODE = """
import sys, torch
import mambacompress as mc
from mambacompress.kernels import gpu, registry
from mambacompress.models.lm import LanguageModel, generate
from tests.conftest import _host

kind, recipe = sys.argv[1:]
device = "cpu" if gpu.interpreted() else "cuda"
torch.manual_seed(0)
ids = torch.randint(1, 97, (2, 6))
model = mc.quantize(_host(kind), recipe, calibration=ids.repeat(2, 1), overrides=sys.stdin.read().split()).model
lm, ids = LanguageModel.of(model.to(device)), ids.to(device)
logits, made = {}, {}
for backend in ("triton", "reference"):
    with registry.backend(backend), torch.no_grad(), registry.recording() as record:
        logits[backend] = lm.prefill(ids)[0]
        made[backend] = generate(lm, ids, 3, eos_token_id=[], state="int8")
    assert backend == "reference" or {c.backend for c in record if c.backend != "single ops"} == {"triton"}, record
    print(backend, sorted({c.op for c in record}))
error = float((logits["triton"] - logits["reference"]).norm() / logits["reference"].norm())
assert error < 2e-2, error  # a rounding that goes the other way is one step of an int8 code
print("error", error)
"""


@pytest.mark.parametrize(("kind", "recipe"), [("mamba", "w8a8"), ("mamba2", "w4a8")])
def test_quantized_models_run_on_triton_alone(kind: str, recipe: str) -> None:
    if not gpu.installed():
        pytest.skip("Triton is not installed")
    overrides = "checks.max_perplexity_ratio=null"
    if recipe == "w4a8":
        overrides += " passes.gptq=null passes.quantize.scale_search=false passes.quantize.group_size=32"
    done = subprocess.run([sys.executable, "-c", CODE, kind, recipe], input=overrides, capture_output=True, text=True,
                          env={**os.environ, "MAMBACOMPRESS_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "int8_linear" in done.stdout or "int4_linear" in done.stdout
