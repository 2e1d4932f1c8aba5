"""Fine-tune a Mamba to 2:4 sparsity with transformers' Trainer: python examples/trainer.py [MODEL] [STEPS]."""

import sys
from itertools import islice

from transformers import Trainer, TrainingArguments

import mambacompress as mc
from mambacompress.data import encode, stdlib_texts, training_batches
from mambacompress.training.hf_callback import SessionCallback

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
model, tokenizer = mc.load(source), mc.load_tokenizer(source)
windows = training_batches(encode(tokenizer, stdlib_texts("train")), batch=1, length=128)
dataset = [{"input_ids": ids[0], "labels": ids[0]} for ids in islice(windows, 4 * steps)]

session = mc.attach(model, "nm-2of4", steps=steps, overrides={"training.method": "mdgf-exponential"})
arguments = TrainingArguments("trainer", max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                              learning_rate=1e-3, lr_scheduler_type="cosine", logging_steps=20, save_steps=steps,
                              use_cpu=True, report_to="none")
Trainer(model, arguments, train_dataset=dataset, callbacks=[SessionCallback(session)]).train()
print(mc.save(model, "finetuned", tokenizer=tokenizer), model.config.nm_sparsity)
