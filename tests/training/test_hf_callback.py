"""The callback in transformers' Trainer: the same masks wherever it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mambacompress as mc
from mambacompress import nm
from mambacompress.errors import UserError
from mambacompress.nm import Pattern
from mambacompress.training.hf_callback import FILE, SessionCallback


def trainer(model: Any, session: mc.Session, out: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 97, (12,), generator=generator) for _ in range(24)]
    arguments = TrainingArguments(str(out), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                  learning_rate=5e-3, save_steps=3, use_cpu=True, report_to="none", disable_tqdm=True,
                                  logging_strategy="no")
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
                   callbacks=[SessionCallback(session)])


def attached(make_host: Any) -> tuple[Any, mc.Session]:
    model = make_host("mamba")
    return model, mc.attach(model, "nm-2of4", steps=6, overrides={"training.method": "mdgf-linear"})


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(make_host: Any, tmp_path: Path):
    model, session = attached(make_host)
    trainer(model, session, tmp_path / "one").train()
    assert session.step_count == 6  # not the 12 micro-batches
    weight = model.backbone.layers[0].mixer.in_proj.weight
    assert nm.excess(weight, Pattern(2, 4)) == 0
    kept = load_file(tmp_path / "one" / "checkpoint-3" / FILE)
    assert int(kept["steps"]) == 3
    assert kept["mask.backbone.layers.0.mixer.in_proj"].dtype == torch.bool

    again, other = attached(make_host)
    trainer(again, other, tmp_path / "one").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert torch.equal(again.backbone.layers[0].mixer.in_proj.weight, weight)
    with pytest.raises(UserError, match="this session is over"):
        trainer(again, other, tmp_path / "two").train()


def test_a_checkpoint_without_masks_is_refused(make_host: Any, tmp_path: Path):
    model, session = attached(make_host)
    trainer(model, session, tmp_path).train()
    (tmp_path / "checkpoint-3" / FILE).unlink()
    model, session = attached(make_host)
    with pytest.raises(UserError, match="holds no masks"):
        trainer(model, session, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
