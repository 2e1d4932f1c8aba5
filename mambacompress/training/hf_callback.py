"""Sparse training in transformers' own Trainer.

    session = mc.attach(model, "nm-2of4", steps=2000)
    trainer = Trainer(model, arguments, train_dataset=..., callbacks=[SessionCallback(session)],
                      optimizers=(session.optimizer(1e-3), None))        # cast needs its own; else leave them out
    trainer.train()
    mc.save(model, "model-2of4")

The session steps with the optimizer, not with micro-batches; its masks go into every checkpoint
(``session.safetensors``) and come back where training resumes from one; at the end the zeros are written. CAST's
self-distillation is part of the loss: call ``session.loss`` in the ``compute_loss`` of a Trainer of your own, or train
with eta 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from mambacompress import storage
from mambacompress.errors import UserError
from mambacompress.training.session import Session

FILE = "session.safetensors"


class SessionCallback(TrainerCallback):
    """See the module. session: as ``mc.attach`` returned it, still open."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the Trainer has resumed from a checkpoint, take the masks from it too."""
        if not self.session.layers:
            raise UserError("this session is over, and the model trains dense", "attach again")
        if state.global_step:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            if not file.is_file():
                raise UserError(f"the checkpoint {file.parent} holds no masks", "resume a run with this callback")
            self.session.load(load_file(file))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step."""
        self.session.step(kwargs.get("optimizer"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The masks, beside the checkpoint's other files."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            storage.make_directory(folder)
            storage.write_tensors(folder / FILE, self.session.tensors())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the zeros."""
        self.session.finish()


__all__ = ["SessionCallback"]
