"""Fine-tune a Mamba to 2:4 sparsity in plain PyTorch: python examples/finetune.py [MODEL] [STEPS] [TEXT HELD_OUT]."""

import sys

import torch

import mambacompress as mc
from mambacompress.data import encode, read_texts, stdlib_texts, training_batches

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
texts, held_out = map(read_texts, sys.argv[3:5]) if len(sys.argv) > 4 else map(stdlib_texts, ("train", "valid"))
model, tokenizer = mc.load(source), mc.load_tokenizer(source)
batches = training_batches(encode(tokenizer, texts), batch=4, length=128)

with mc.attach(model, "nm-2of4", steps=steps) as session:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, ids in zip(range(steps), batches, strict=False):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        session.step(optimizer)
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {session.sparsity():.0%} sparse", flush=True)

mc.save(model, "finetuned", tokenizer=tokenizer)  # in float, with its zeros
packed = mc.sparsify("finetuned", "nm-2of4", out="finetuned-2of4", overrides=["calibration.sequences=4"])
models = {"original": mc.load(source), "2:4": packed.model}
candidates = [mc.Candidate(name, lambda m=m: (m, tokenizer)) for name, m in models.items()]
report = mc.evaluate(candidates, texts={"held out": held_out}, windows=16, speed=False)
for row in report.models:
    print(row.name, row.texts[0].perplexity)
