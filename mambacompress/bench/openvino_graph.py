"""The peer OpenVINO: a stateful step graph written by hand from the original's weights, compressed by nncf.

One inference is one token of B sequences: embedding, every block's recurrent step with its states in OpenVINO's
variables, final norm, head. Weights are compressed as ``nncf.compress_weights`` does by itself: int8 per channel, or
int4 in groups of 64 (smaller ones, or int8, where 64 does not divide) with embedding and head in int8. The CPU plugin
has its defaults otherwise (latency hint, one stream), which include dynamic quantization of activations and bf16 where
the processor has it. A graph of a fixed batch runs faster than one of any batch, so each batch size is compiled apart.
There is no prefill: a prompt in one call would need the scan as one operation, which OpenVINO has not got. Feeds fixed
tokens, as the peer llama.cpp does.

Legend: B batch, D d_model, E d_inner, K conv width, C conv channels, N d_state, R dt_rank, G groups, H heads a group,
P head_dim, V vocabulary.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

os.environ.setdefault("NNCF_CI", "1")  # nncf reports its use to its makers unless it is told so before its import

import nncf

from mambacompress.bench.runner import Runner, clock

GROUP = 64


class Graph:
    """The step graph of a checkpoint under construction: weights by name, a variable a state."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if self.config.get("model_type") not in ("mamba", "mamba2"):
            raise ValueError(f"the step graph is written for mamba and mamba2, not {self.config.get('model_type')!r}")
        if self.config.get("use_bias"):
            raise ValueError("the step graph has no bias on in_proj and out_proj")
        self._weights = _weights(directory)
        self.ids_B = ops.parameter([-1], np.int64, name="ids")
        self._batch = ops.shape_of(self.ids_B, output_type="i64")
        self._sinks: list[Any] = []

    def model(self) -> ov.Model:
        """The whole graph: ids [B] -> logits [B, V]."""
        embedding_VD = self._constant("embeddings.weight")
        h_BD = ops.gather(embedding_VD, self.ids_B, _whole(0))
        mixer = self._mamba if self.config["model_type"] == "mamba" else self._mamba2
        for i in range(self.config["num_hidden_layers"]):
            x_BD = self._norm(h_BD, f"layers.{i}.norm.weight")
            h_BD = ops.add(h_BD, mixer(x_BD, f"layers.{i}.mixer."))
        x_BD = self._norm(h_BD, "norm_f.weight")
        tied = "lm_head.weight" not in self._weights
        logits_BV = ops.matmul(x_BD, embedding_VD if tied else self._constant("lm_head.weight"), False, True)
        return ov.Model([ops.result(logits_BV)], self._sinks, [self.ids_B], "mamba_step")

    def _mamba(self, x_BD: Any, place: str) -> Any:
        rank, states = self.config["time_step_rank"], self.config["state_size"]
        x_BE, z_BE = ops.split(self._linear(x_BD, place + "in_proj"), _whole(1), 2).outputs()
        x_BE = self._conv(x_BE, place)
        low_BR, B_BN, C_BN = _cut(self._linear(x_BE, place + "x_proj"), rank, states, states)
        dt_BE = ops.softplus(self._linear(low_BR, place + "dt_proj"))
        A_EN = ops.constant(-np.exp(self._weights[place + "A_log"]))
        decay_BEN = ops.exp(ops.multiply(_behind(dt_BE), A_EN))
        inflow_BEN = ops.multiply(_behind(ops.multiply(dt_BE, x_BE)), ops.unsqueeze(B_BN, _whole(1)))
        before_BEN = self._state(place + "ssm", list(A_EN.shape))
        h_BEN = ops.add(ops.multiply(decay_BEN, before_BEN), inflow_BEN)
        self._keep(h_BEN, place + "ssm")
        y_BE = ops.squeeze(ops.matmul(h_BEN, _behind(C_BN), False, False), _whole(2))
        y_BE = ops.add(y_BE, ops.multiply(self._constant(place + "D"), x_BE))
        return self._linear(ops.multiply(y_BE, ops.swish(z_BE)), place + "out_proj")

    def _mamba2(self, x_BD: Any, place: str) -> Any:
        groups, states, width = self.config["n_groups"], self.config["state_size"], self.config["head_dim"]
        heads = self.config["num_heads"]
        E, shape = heads * width, (groups, heads // groups)
        z_BE, mixed_BC, dt_BX = _cut(self._linear(x_BD, place + "in_proj"), E, E + 2 * groups * states, heads)
        x_BE, B_BX, C_BX = _cut(self._conv(mixed_BC, place), E, groups * states, groups * states)
        x_BGHP = _shaped(x_BE, *shape, width)
        B_BG11N, C_BG11N = (_shaped(part, groups, 1, 1, states) for part in (B_BX, C_BX))
        dt_BX = ops.softplus(ops.add(dt_BX, self._constant(place + "dt_bias")))
        decay_BX = ops.exp(ops.multiply(dt_BX, ops.constant(-np.exp(self._weights[place + "A_log"]))))
        inflow_BGHPN = ops.multiply(_behind(ops.multiply(_shaped(dt_BX, *shape, 1), x_BGHP)), B_BG11N)
        before_BGHPN = self._state(place + "ssm", [*shape, width, states])
        h_BGHPN = ops.add(ops.multiply(_shaped(decay_BX, *shape, 1, 1), before_BGHPN), inflow_BGHPN)
        self._keep(h_BGHPN, place + "ssm")
        y_BGHP = ops.reduce_sum(ops.multiply(h_BGHPN, C_BG11N), _whole(4), False)
        D_GH1 = ops.constant(self._weights[place + "D"].reshape(*shape, 1))
        y_BE = _shaped(ops.add(y_BGHP, ops.multiply(D_GH1, x_BGHP)), E)
        y_BGX = _shaped(ops.multiply(y_BE, ops.swish(z_BE)), groups, E // groups)
        y_BE = ops.multiply(_shaped(self._normed(y_BGX), E), self._constant(place + "norm.weight"))
        return self._linear(y_BE, place + "out_proj")

    def _conv(self, x_BC: Any, place: str) -> Any:
        """The causal convolution's step and its SiLU; the last K - 1 inputs are a state."""
        weight_KC = np.ascontiguousarray(self._weights[place + "conv1d.weight"][:, 0].T)
        before = self._state(place + "conv", [weight_KC.shape[0] - 1, weight_KC.shape[1]])
        window_BKC = ops.concat([before, ops.unsqueeze(x_BC, _whole(1))], 1)
        self._keep(ops.slice(window_BKC, _list(1), _list(weight_KC.shape[0]), _list(1), _list(1)), place + "conv")
        y_BC = ops.reduce_sum(ops.multiply(window_BKC, ops.constant(weight_KC)), _whole(1), False)
        if place + "conv1d.bias" in self._weights:
            y_BC = ops.add(y_BC, self._constant(place + "conv1d.bias"))
        return ops.swish(y_BC)

    def _linear(self, x: Any, name: str) -> Any:
        y = ops.matmul(x, self._constant(name + ".weight"), False, True)
        return ops.add(y, self._constant(name + ".bias")) if name + ".bias" in self._weights else y

    def _norm(self, x: Any, weight: str) -> Any:
        return ops.multiply(self._normed(x), self._constant(weight))

    def _normed(self, x: Any) -> Any:
        """x over its RMS along the last axis."""
        square = ops.reduce_mean(ops.multiply(x, x), ops.constant(np.array([-1], np.int64)), True)
        eps = ops.constant(np.float32(self.config["layer_norm_epsilon"]))
        return ops.divide(x, ops.sqrt(ops.add(square, eps)))

    def _constant(self, name: str) -> Any:
        constant = ops.constant(self._weights[name])
        constant.set_friendly_name(name)
        return constant

    def _state(self, name: str, shape: list[int]) -> Any:
        """What a variable [B, *shape] holds, zeros at first."""
        wanted = ops.concat([self._batch, ops.constant(np.array(shape, np.int64))], 0)
        zeros = ops.broadcast(ops.constant(np.float32(0)), wanted)
        return ops.read_value(zeros, name, ov.Type.f32, ov.PartialShape([-1, *shape]))

    def _keep(self, value: Any, name: str) -> None:
        self._sinks.append(ops.assign(value, name))


def _whole(value: int) -> Any:
    return ops.constant(np.int64(value))


def _list(value: int) -> Any:
    return ops.constant(np.array([value], np.int64))


def _behind(x: Any) -> Any:
    """x with one more axis of one at the end."""
    return ops.unsqueeze(x, _whole(-1))


def _cut(x: Any, *sizes: int) -> list[Any]:
    """Parts of those sizes along the last axis."""
    return list(ops.variadic_split(x, _whole(-1), ops.constant(np.array(sizes, np.int64))).outputs())


def _shaped(x: Any, *shape: int) -> Any:
    """[B, ...] -> [B, *shape]."""
    return ops.reshape(x, ops.constant(np.array([0, *shape], np.int64)), True)


def _weights(directory: Path) -> dict[str, np.ndarray]:
    """fp32 weights by their names without ``backbone.``."""
    from safetensors.torch import load_file

    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[name.removeprefix("backbone.")] = tensor.float().numpy()
    if not found:
        raise ValueError(f"{directory} holds no *.safetensors")
    return found


class StepGraph(Runner):
    """The contestant: a compiled graph a batch size, made when it is first needed."""

    prefills = False

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._core = path, ov.Core()
        self._settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._requests: dict[int, Any] = {}
        self._vocabulary = int(self._request(1).get_compiled_model().output(0).partial_shape[1].get_length())

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def step_logits(self, ids_BL: np.ndarray) -> np.ndarray:
        request = self._request(len(ids_BL))
        request.reset_state()
        return np.stack([self._step(request, ids_B).copy() for ids_B in ids_BL.T], 1)

    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        request = self._request(len(ids_B))
        request.reset_state()
        self._step(request, ids_B)

        def loop() -> None:
            for _ in range(steps):
                self._step(request, ids_B)

        return clock(loop)

    def facts(self) -> dict[str, Any]:
        compiled = self._requests[1].get_compiled_model()
        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        return {"openvino": ov.__version__, "nncf": nncf.__version__, "inference_precision": precision}

    def _request(self, batch: int) -> Any:
        if batch not in self._requests:
            model = self._core.read_model(self._path)
            variables = {
                name: [batch, *(size.get_length() for size in list(shape)[1:])]
                for name, shape in ((v.get_info().variable_id, v.get_info().data_shape) for v in model.get_variables())
            }
            model.reshape({"ids": [batch]}, variables_shapes=variables)
            self._requests[batch] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        return self._requests[batch]

    @staticmethod
    def _step(request: Any, ids_B: np.ndarray) -> np.ndarray:
        """logits [B, V] of one more token; the array is overwritten by the next step."""
        request.infer({0: np.ascontiguousarray(ids_B)}, share_inputs=True)
        logits_BV: np.ndarray = request.get_output_tensor(0).data
        return logits_BV


def prepare(model: str, variants: list[str], folder: str) -> dict[str, str]:
    """The step graph with compressed weights of every variant, as OpenVINO files."""
    files = {}
    for variant in variants:
        graph = Graph(Path(model)).model()
        if variant == "int8":
            compressed = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            compressed = nncf.compress_weights(
                graph,
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=GROUP,
                ratio=1.0,
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                ),
            )
        files[variant] = str(Path(folder) / f"{variant}.xml")
        ov.save_model(compressed, files[variant], compress_to_fp16=False)
    return files


def warm(path: str) -> None:
    """Load the CPU plugin."""
    ov.Core().get_property("CPU", "FULL_DEVICE_NAME")


def make(path: str, variant: str, threads: int, prompt: int, batch: int) -> StepGraph:
    """The loaded contestant."""
    return StepGraph(path, threads)


__all__ = ["Graph", "StepGraph", "make", "prepare", "warm"]
