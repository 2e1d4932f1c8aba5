"""``distill(student, teacher, loss=...)``: a loss module for any training loop.

    loss = mc.distill(student, teacher, loss={"kl": 1.0, "ce": 0.5}, temperature=2.0)
    loss(input_ids, attention_mask).backward()          # gradients land in the student alone

The module is called with a batch and runs both models: the teacher in eval mode and without gradients, the student as
it is. Its parameters are the student's (wrap *it* in DistributedDataParallel, not the student).

Reduction: logits are flattened to the shifted tokens that are valid, i.e. neither they nor the token they predict are
padding, nor the label -100; what is summed over them is divided by their number. With gradient accumulation that number
is the one of *all* micro-batches (``counts``), so that cutting a batch changes nothing. KLDivLoss(batchmean) on [B, L,
V] would divide by B alone and be L times too large. Layer losses are means over the tokens that are no padding, and
over the layers. A vocabulary padded to a round number is cut to the smaller one before the softmax.

Legend: B batch, L tokens, V vocabulary or classes, M valid rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError, did_you_mean
from mambacompress.models.lm import LanguageModel
from mambacompress.models.matrices import ssd_matrix
from mambacompress.models.mixers import SSDMixer
from mambacompress.training.losses import FROM_LABELS, KINDS, relative_error, row_losses

LAYERS, MATRICES = "layers", "matrices"
MATCHES = ("hidden", "mixer")
IGNORED = -100  # a label that counts nothing
PADDING = 256  # how much wider than the other a vocabulary may be and still be the same one, padded


@dataclass(frozen=True)
class Counts:
    """Rows a loss is divided by. predicted: valid shifted tokens (or images); seen: tokens that are no padding."""

    predicted: int
    seen: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.predicted + other.predicted, self.seen + other.seen)


def distill(student: nn.Module, teacher: nn.Module, loss: str | Mapping[str, float] = "kl", *,
            temperature: float = 1.0, match: str = "hidden", teacher_inputs: bool = False,
            layers: Sequence[tuple[int, int]] | Sequence[tuple[nn.Module, nn.Module]] | None = None,
            vocabulary: int | None = None) -> Distiller:
    """The loss of ``student`` beside ``teacher``, as a module: call it with a batch, get a scalar.

    student, teacher: language models (``model(input_ids=..., use_cache=False).logits``) or classifiers (``model(x)``
    gives logits). loss: one of ce, hard, kl, reverse-kl, jsd, mse (``training.losses``), ``layers`` and ``matrices``,
    or several with a weight each. temperature: of kl, reverse-kl and jsd; they are multiplied by its square.

    ``layers`` is the relative squared error of every layer: of the residual behind it (match ``hidden``) or of what its
    mixer adds (``mixer``). layers: which student layer learns from which teacher layer, by index or as modules; the
    last of every equal share of the teacher's where None. teacher_inputs: each student layer is run on the *teacher's*
    input to its layer, so that errors do not add up on the way. ``matrices`` compares, row by row, what a Mamba-2 mixer
    multiplies a short sequence with (``models.matrices``) with its teacher's, a mixer or an attention map. vocabulary:
    how many logits are real.

    Raises UserError for an unknown loss or match, a weight that is negative or all zero, and for a student that is its
    own teacher.
    """
    weights = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    return Distiller(student, teacher, weights, temperature=temperature, match=match, teacher_inputs=teacher_inputs,
                     layers=layers, vocabulary=vocabulary)


class Distiller(nn.Module):
    """See ``distill``. ``parts`` holds the unweighted losses of the last call, by name."""

    def __init__(self, student: nn.Module, teacher: nn.Module, weights: Mapping[str, float], *, temperature: float,
                 match: str, teacher_inputs: bool, layers: Sequence[tuple[Any, Any]] | None,
                 vocabulary: int | None) -> None:
        super().__init__()
        known = (*KINDS, LAYERS, MATRICES)
        for name, weight in weights.items():
            if name not in known:
                raise UserError(f"there is no loss {name!r}{did_you_mean(name, known)}",
                                f"choose of {', '.join(known)}")
            if not weight >= 0:
                raise UserError(f"the weight of {name} is {weight}", "make it at least 0")
        if match not in MATCHES:
            raise UserError(f"there is no match {match!r}{did_you_mean(match, MATCHES)}",
                            f"choose {' or '.join(MATCHES)}")
        if not temperature > 0:
            raise UserError(f"a temperature of {temperature} is none", "make it larger than 0")
        if student is teacher:
            raise UserError("the student is its own teacher: nothing would be learned", "make the teacher a copy")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        if not self.weights:
            raise UserError("no loss has a weight", f"give one of {', '.join(known)} a weight above 0")
        self.student = student
        self._teacher = (teacher.eval(),)  # in a tuple: no submodule, its parameters are not those of this module
        self.temperature, self.match, self.teacher_inputs = temperature, match, teacher_inputs
        self.vocabulary = vocabulary
        self.pairs = self._pairs(layers) if {LAYERS, MATRICES} & set(self.weights) else []
        self.parts: dict[str, Tensor] = {}

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
                counts: Counts | None = None) -> Tensor:
        """The weighted loss of a batch; a scalar.

        inputs: token ids, int64 [B, L], or whatever a classifier takes. attention_mask: [B, L], 0 at padding. labels:
        of tokens [B, L], not shifted, -100 where nothing is learned (the ids themselves where None); of a classifier
        [B]. counts: of all micro-batches together (``count``); this batch's own where None. Raises UserError where
        nothing is valid, or shapes do not fit.
        """
        text = not inputs.is_floating_point()
        counts = counts or self.count(inputs, attention_mask, labels)
        if not counts.predicted:
            raise UserError("there is no token to learn from in this batch", "give longer or less padded sequences")
        extra = {"attention_mask": attention_mask} if text and attention_mask is not None else {}
        teacher_logits, taught = self._run_teacher(inputs, text, extra)
        student_logits, learnt = self._run_student(inputs, text, extra, taught)
        self.parts = {}
        if student_logits is not None:
            self._logit_losses(student_logits, teacher_logits, inputs, attention_mask, labels, counts.predicted, text)
        if LAYERS in self.weights:
            self._compare(LAYERS, list(map(_first, learnt.outputs)), list(map(_first, taught.outputs)), attention_mask,
                          counts.seen, text)
        if MATRICES in self.weights:
            with torch.no_grad():
                wanted = [_map(teacher, seen) for (_, teacher), seen in zip(self.pairs, taught.all(), strict=True)]
            own = [_map(student, seen) for (student, _), seen in zip(self.pairs, learnt.all(), strict=True)]
            self._compare(MATRICES, own, wanted, attention_mask, counts.seen, text)
        total = sum((weight * self.parts[name] for name, weight in self.weights.items()),
                    start=torch.zeros((), device=inputs.device))
        self.parts = {name: part.detach() for name, part in self.parts.items()}
        return total

    def _run_teacher(self, inputs: Tensor, text: bool, extra: Mapping[str, Any]) -> tuple[Tensor | None, _Seen]:
        """Its logits, and what its layers saw; not run at all where no loss looks at it."""
        with _watched([teacher for _, teacher in self.pairs]) as seen, torch.no_grad():
            if set(self.weights) <= set(FROM_LABELS):
                return None, seen
            logits = _logits(self.teacher.eval(), inputs, text, extra)
        seen.check("teacher")
        return logits, seen

    def _run_student(self, inputs: Tensor, text: bool, extra: Mapping[str, Any], taught: _Seen
                     ) -> tuple[Tensor | None, _Seen]:
        """Its logits (None where no loss needs them), and what its layers saw: of the batch, or the teacher's."""
        modules = [student for student, _ in self.pairs]
        needs_logits = any(name in KINDS for name in self.weights)
        forced = self.teacher_inputs and bool(modules)
        logits = None
        with _watched([] if forced else modules) as seen:
            if needs_logits or not forced:
                logits = _logits(self.student, inputs, text, extra)
        seen.check("student")
        if forced:
            seen = _Seen(modules)
            for i, (module, (args, kwargs)) in enumerate(zip(modules, taught.calls, strict=True)):
                seen.saw(i, args, kwargs, module(*args, **kwargs) if LAYERS in self.weights else None)
        return (logits if needs_logits else None), seen

    @staticmethod
    def count(inputs: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Counts:
        """What a batch has to be divided by; counts of micro-batches add up."""
        if inputs.is_floating_point():
            return Counts(len(inputs), len(inputs))
        seen = inputs.numel() if attention_mask is None else int((attention_mask != 0).sum())
        return Counts(int(_valid(inputs, attention_mask, labels).sum()), seen)

    def _logit_losses(self, student: Tensor, teacher: Tensor | None, inputs: Tensor, mask: Tensor | None,
                      labels: Tensor | None, count: int, text: bool) -> None:
        width = self._width(student.shape[-1], student.shape[-1] if teacher is None else teacher.shape[-1])
        targets = labels
        if text:
            valid_BM = _valid(inputs, mask, labels)
            targets = (inputs if labels is None else labels)[:, 1:][valid_BM]
            student = student[:, :-1][valid_BM]
            teacher = None if teacher is None else teacher[:, :-1][valid_BM]
        if targets is not None and len(targets) and int(targets.max()) >= width:
            raise UserError(f"the label {int(targets.max())} lies outside the {width:,} logits", "check the vocabulary")
        student_MV, teacher_MV = student[..., :width], None if teacher is None else teacher[..., :width]
        for name in self.weights:
            if name in KINDS:
                if name == "ce" and targets is None:
                    raise UserError("the loss ce needs labels", "pass labels=")
                rows_M = row_losses(name, student_MV, teacher_MV, targets, self.temperature)
                self.parts[name] = rows_M.sum() / count

    def _compare(self, name: str, student: list[Tensor], teacher: list[Tensor], mask: Tensor | None,
                 count: int, text: bool) -> None:
        """The relative error of outputs [B, L, D] or matrices [B, H, L, L]: a mean over tokens, layers and heads."""
        total = torch.zeros((), device=teacher[0].device)
        for own, wanted in zip(student, teacher, strict=True):
            if own.shape != wanted.shape:
                raise UserError(f"a student's layer gives {list(own.shape)}, its teacher's {list(wanted.shape)}",
                                f"match layers of one width and head count, or leave {name} out")
            rows = relative_error(own, wanted)  # [B, L], or [B, H, L] of matrices
            rows = rows.mean(1) if name == MATRICES else rows
            rows = rows if text else rows.flatten(1).mean(1) if rows.dim() > 1 else rows  # an image's tokens
            total = total + (rows if mask is None else rows[mask != 0]).sum()
        self.parts[name] = total / (count * len(student))

    def _width(self, student: int, teacher: int) -> int:
        if self.vocabulary is not None:
            if self.vocabulary > min(student, teacher):
                raise UserError(f"a vocabulary of {self.vocabulary:,} is wider than logits of "
                                f"{min(student, teacher):,}", "give the tokenizer's size")
            return self.vocabulary
        if abs(student - teacher) >= PADDING:
            raise UserError(f"logits of {student:,} and {teacher:,} are of two vocabularies",
                            "distil between models of one tokenizer, or pass vocabulary=")
        return min(student, teacher)

    def _pairs(self, layers: Sequence[tuple[Any, Any]] | None) -> list[tuple[nn.Module, nn.Module]]:
        if layers is not None and layers and isinstance(layers[0][0], nn.Module):
            return list(layers)
        whats = {self.match} | ({"mixer"} if MATRICES in self.weights else set())
        own, other = ([block.mixer if "mixer" in whats else block.module
                       for block in LanguageModel.of(model).model_map.blocks] for model in (self.student, self.teacher))
        chosen = layers if layers is not None else layer_pairs(len(own), len(other))
        try:
            return [(own[i], other[j]) for i, j in chosen]
        except IndexError as error:
            raise UserError(f"layers {list(chosen)} are not all there: the student has {len(own)}, the teacher "
                            f"{len(other)}", "count from 0") from error


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer): the last of every equal share of the teacher's."""
    if student > teacher:
        raise UserError(f"a student of {student} layers has more than its teacher's {teacher}", "pass layers=")
    return [(i, round((i + 1) * teacher / student) - 1) for i in range(student)]


# -- running models ----------------------------------------------------------------------------------------------------


def _logits(model: nn.Module, inputs: Tensor, text: bool, wanted: Mapping[str, Any]) -> Tensor:
    output = model(input_ids=inputs, use_cache=False, **wanted) if text else model(inputs)
    return output.logits if hasattr(output, "logits") else output


def _valid(ids_BL: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Where a shifted token counts, bool [B, L-1]."""
    if labels is not None and labels.shape != ids_BL.shape:
        raise UserError(f"labels {list(labels.shape)} do not fit ids {list(ids_BL.shape)}", "give them unshifted")
    valid = torch.ones_like(ids_BL[:, 1:], dtype=torch.bool)
    if mask is not None:
        valid &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return valid if labels is None else valid & (labels[:, 1:] != IGNORED)


class _Seen:
    """What watched modules were called with and gave, in the modules' order."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._outputs: list[list[Any]] = [[] for _ in modules]
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {}) for _ in modules]

    def saw(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._outputs[i].append(output)
        self._calls[i] = (args, kwargs)

    def check(self, whose: str) -> None:
        """Every module must have run once: one that is bypassed would silently teach nothing."""
        for i, found in enumerate(self._outputs):
            if len(found) != 1:
                raise UserError(f"layer {i} of the {whose} ran {len(found)} times in one forward",
                                "name modules that the model calls once")

    @property
    def outputs(self) -> list[Any]:
        return [found[0] for found in self._outputs]

    def all(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """(arguments, keyword arguments, output) of every module."""
        for (args, kwargs), output in zip(self._calls, self.outputs, strict=True):
            yield args, kwargs, output

    @property
    def calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return self._calls


@contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[_Seen]:
    seen = _Seen(modules)
    handles = [module.register_forward_hook(
        lambda _, args, kwargs, output, i=i: seen.saw(i, args, kwargs, output), with_kwargs=True)
        for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _map(module: nn.Module, seen: tuple[tuple[Any, ...], dict[str, Any], Any]) -> Tensor:
    """The matrix [B, H, L, L] of a Mamba-2 mixer on what it was called with, or the attention map that came out."""
    mixer, (args, kwargs, output) = getattr(module, "mixer", module), seen
    if isinstance(mixer, SSDMixer):
        return ssd_matrix(mixer, args[0] if args else kwargs["hidden_states"])
    if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
        return output[1]
    raise UserError(f"a {type(module).__name__} shows no matrix: it is no Mamba-2 mixer, and gives no attention map",
                    "load the teacher with attn_implementation='eager', or leave matrices out")


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def total_counts(parts: Iterable[Counts]) -> Counts:
    """The counts of all micro-batches of a step."""
    return sum(parts, start=Counts(0, 0))
