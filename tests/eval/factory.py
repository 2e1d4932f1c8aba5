"""A made-up report with every kind of figure, for the tests of what is rendered from it."""

from __future__ import annotations

import math

import numpy as np

from mambacompress.eval import stats
from mambacompress.eval.report import Report
from mambacompress.eval.schema import AgreementResult, ModelResult, Size, Speed, TaskResult, TextResult

ROWS = (  # name, file bytes, bits a weight, change of the loss, share of answers that flip
    ("original", 18_220_000, 32.0, 0.0, 0.0, "fp32"),
    ("rtn-w8a8", 4_980_000, 8.1, 0.0013, 0.004, "round to nearest"),
    ("w8a8", 5_010_000, 8.15, 0.0003, 0.002, "KLT-Hadamard rotations, GPTQ"),
    ("w8a8-static", 5_010_500, 8.15, 0.0009, 0.003, "per-tensor activations"),
    ("w4a16", 3_200_000, 4.5, 0.0031, 0.01, "GPTQ, groups of 64"),
    ("w4a8", 3_200_400, 4.5, 0.0044, 0.011, "GPTQ, groups of 64"),
    ("w4a4", 3_201_000, 4.5, 0.0242, 0.03, "4-bit activations"),
    ("quarot-w8a8", 5_000_000, 8.12, 0.0007, 0.003, "plain Hadamard"),
)


def made_up_report() -> Report:
    """Eight models, two texts, three tasks; deterministic."""
    draw = np.random.default_rng(0)
    losses = {text: draw.normal(mean, 0.25, 60) * 511 for text, mean in (("test_novels", 3.73), ("wikitext2", 5.13))}
    answers = {
        task: (draw.random(n) < rate).astype(float) for task, n, rate in (("blimp", 6700, 0.71), ("copa", 100, 0.58))
    }
    words = draw.normal(-6.0, 3.0, 500)
    models = []
    for name, size, bits, cost, flips, description in ROWS:
        row = ModelResult(
            name=name,
            description=description,
            backend="selective_scan: native",
            hardware="A processor, 2 cores",
            versions={"python": "3.11", "torch": "2.13.0"},
            seeds={"tasks": 0},
            dtype="int8 96%, float32 4%",
        )
        scales = 60_000 if cost else 0
        parts = {"weights": int(size * 0.7) - scales, "scales": scales, "masks": 0, "embeddings": int(size * 0.25)}
        parts["other"] = size - 6000 - sum(parts.values())
        row.size = Size(
            file_bytes=size,
            tensor_bytes=size - 6000,
            header_bytes=6000,
            categories=parts,
            dtypes={"I8": size - 6000},
            weights=4_500_000,
            bits_per_weight=bits,
            linear_bits=bits,
            other_files={"tokenizer.json": 250_000, "config.json": 900},
            state_bytes=311_296,
            state_note="fp32",
        )
        for text, base in losses.items():
            shifted = base + 511 * cost * (1 + draw.normal(0, 0.5, 60) + (0.5 if text == "wikitext2" else 0))
            value = stats.perplexity(shifted, [511] * 60)
            row.texts.append(
                TextResult(
                    text=text,
                    context=512,
                    stride=512,
                    windows=60,
                    tokens=60 * 511,
                    perplexity=value.value,
                    se=value.se,
                    window_nll=shifted.tolist(),
                    window_tokens=[511] * 60,
                    fingerprint=text,
                )
            )
            if cost:
                kl = cost * 1.7 + 2e-4
                row.agreement.append(
                    AgreementResult(
                        text=text,
                        context=512,
                        tokens=30_660,
                        kl=kl,
                        kl_se=kl / 20,
                        kl_median=kl / 3,
                        kl_90=kl * 2,
                        kl_99=kl * 9,
                        kl_max=kl * 80,
                        top1=1 - 2 * math.sqrt(kl) / 5,
                        top1_se=0.0009,
                        fingerprint=text,
                    )
                )
        for task, base in answers.items():
            values = np.where(draw.random(len(base)) < flips, 1 - base, base)
            mean = stats.mean(values)
            row.tasks.append(
                TaskResult(
                    task=task,
                    metric="acc",
                    n=len(base),
                    shots=0,
                    ctx=40,
                    cut=0,
                    value=mean.value,
                    se=mean.se,
                    chance=0.5,
                    values=values.tolist(),
                    fingerprint=task,
                )
            )
        shifted_words = words - cost
        value = stats.perplexity(-shifted_words, [1] * 500)
        row.tasks.append(
            TaskResult(
                task="lambada_openai",
                metric="perplexity",
                n=500,
                shots=0,
                ctx=210,
                cut=0,
                value=value.value,
                se=value.se,
                chance=None,
                values=shifted_words.tolist(),
                fingerprint="lambada",
            )
        )
        fast = 1.0 if not cost else 2.4
        row.speed = Speed(
            prompt=512,
            prefill=2900 * fast,
            prefill_quartiles=(2850 * fast, 2950 * fast),
            decode=170 * fast,
            decode_quartiles=(160 * fast, 176 * fast),
            repeats=5,
            threads=1,
            peak_bytes=int(size * 1.6 + 1.2e8),
            start_bytes=110_000_000,
            note="",
            loop="mambacompress",
            backend="native",
        )
        models.append(row)
    return Report(
        created="2026-01-02T03:04:05+00:00",
        title="Accuracy and size",
        baseline="original",
        models=models,
        notes=["Made-up figures."],
    ).compared()
