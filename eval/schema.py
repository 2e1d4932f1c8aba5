"""The schema of ``report.json``: every figure with what is needed to read it, and the raw values that pair two models.

Version 1. A file of a newer version is refused with one sentence; unknown fields of this version are refused too, so
that a typo cannot pass for data. None always means "not measured", and the row's ``not_measured`` says why.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

SCHEMA_VERSION = 1


def _unpack(value: Any) -> Any:
    return [float(character) for character in value] if isinstance(value, str) else value


def _pack(values: list[float]) -> str | list[float]:
    if all(value in (0.0, 1.0) for value in values):
        return "".join("1" if value else "0" for value in values)
    return values


Outcomes = Annotated[list[float], BeforeValidator(_unpack), PlainSerializer(_pack)]
"""Values in order; a row of zeros and ones is written as one string."""


class Strict(BaseModel):
    """Base of all rows."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="null")


class Size(Strict):
    """What a model directory weighs.

    tensor_bytes: of the safetensors files' tensors, split in ``categories``; header_bytes: their headers; file_bytes:
    the sum. other_files: bytes of every other file by name (tokenizer, configuration). weights: how many, matrices
    only.
    """

    file_bytes: int
    tensor_bytes: int
    header_bytes: int
    categories: dict[str, int]
    dtypes: dict[str, int]
    weights: int
    bits_per_weight: float
    linear_bits: float | None
    other_files: dict[str, int]
    state_bytes: int | None
    state_note: str


class TextChange(Strict):
    """Paired comparison of perplexities on the same windows; ``delta`` is the difference, ``ratio`` the quotient."""

    ratio: float
    ratio_se: float | None
    delta: float
    delta_se: float | None


class TextResult(Strict):
    """Perplexity on one text. window_nll: summed loss in nats of every window; window_tokens: its scored tokens."""

    text: str
    context: int
    stride: int
    windows: int
    tokens: int
    perplexity: float
    se: float | None
    window_nll: Outcomes
    window_tokens: list[int]
    fingerprint: str
    change: TextChange | None = None


class AgreementResult(Strict):
    """KL divergence from the baseline in nats a token, and how often both put the same token first."""

    text: str
    context: int
    tokens: int
    kl: float
    kl_se: float | None
    kl_median: float
    kl_90: float
    kl_99: float
    kl_max: float
    top1: float
    top1_se: float | None
    fingerprint: str


class TaskChange(Strict):
    """Paired comparison on the same questions. delta: of the metric (perplexity: ratio - 1); gained and lost: answers
    that
    became right and wrong."""

    delta: float
    se: float | None
    gained: int | None
    lost: int | None


class TaskResult(Strict):
    """One task and metric. value: the metric (a share for accuracies); chance: of guessing; ctx: longest request in
    tokens,
    cut: requests longer than the model was given; values: per question, log-likelihoods for perplexity."""

    task: str
    metric: str
    n: int
    shots: int
    ctx: int
    cut: int
    value: float
    se: float | None
    chance: float | None
    values: Outcomes
    fingerprint: str
    change: TaskChange | None = None


class Speed(Strict):
    """Tokens a second: medians with their quartiles; peak anonymous bytes of a process that loads and runs the model.

    start_bytes: what Python and its libraries held of the peak before loading. loop: whose decoding loop ran, ours or
    transformers'.
    """

    prompt: int
    prefill: float
    prefill_quartiles: tuple[float, float]
    decode: float | None
    decode_quartiles: tuple[float, float] | None
    repeats: int
    threads: int
    peak_bytes: int | None
    start_bytes: int | None
    note: str
    loop: str
    backend: str


class ModelResult(Strict):
    """Everything measured about one model, with the machine and versions it was measured with."""

    name: str
    description: str = ""
    size: Size | None = None
    texts: list[TextResult] = []
    agreement: list[AgreementResult] = []
    tasks: list[TaskResult] = []
    speed: Speed | None = None
    dtype: str = ""
    backend: str = ""
    hardware: str = ""
    versions: dict[str, str] = {}
    seeds: dict[str, int] = {}
    not_measured: list[str] = []


class ReportData(Strict):
    """The file as a whole. baseline: name of the model all changes refer to."""

    schema_version: int = SCHEMA_VERSION
    created: str
    title: str = "Accuracy and size"
    baseline: str | None = None
    models: list[ModelResult] = []
    notes: list[str] = []
