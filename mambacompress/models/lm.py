"""The lean loop: an adopted language model as embedding, blocks, final norm and head, and generation with it.

A host's own ``forward`` and ``generate`` carry caches, masks and output classes that cost more per token than a small
Mamba itself. Here a prefill or a step is the blocks and nothing else; a state is one small record a block, so that it
can be kept, copied and continued from. What is computed is the host's function: the residual in fp32 where its
configuration says so, the very norm and head modules that a pass may have replaced.

    LanguageModel.prefill(ids) -> logits, states        LanguageModel.step(ids, states) -> logits, states
    stream(model, ids, n) -> one tensor of ids a step    generate(model, ids, n) -> ids

Prefill and step are the same code, but for a single token, which takes all blocks in one native call where it can
(``step.py``): with the same bits where the matrices are packed. Sampling draws one uniform number a row and step from a
seeded generator and inverts the cumulative distribution, so that a seed fixes the text.

Legend: B batch, L tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.kernels.linear import linear
from mambacompress.models.families import adopt
from mambacompress.models.families.base import Hosted
from mambacompress.models.graph import GraphedStep, graphed
from mambacompress.models.mixers import MixerState
from mambacompress.models.modelmap import Block, ModelMap
from mambacompress.models.packed_weight import Stored
from mambacompress.models.step import (
    FusedBlocks,
    NativeStates,
    chosen,
    native_states,
    next_states,
    obstacle,
)

States = list[MixerState]
STATE_FORMATS = ("fp32", "int8")  # of the recurrent states while decoding
Sampler = Callable[[Tensor], Tensor]


class LanguageModel:
    """A ModelMap that can be run. Holds no tensor of its own: an edit of the host is an edit of this."""

    def __init__(self, model_map: ModelMap) -> None:
        self.model_map = model_map
        self._fused: FusedBlocks | None = None
        self._begins = True  # the next fused step is the first of a sequence

    @classmethod
    def of(cls, model: Any) -> LanguageModel:
        """The view of an adopted host (or ``model`` itself); raises UserError for a host that is not adopted."""
        if isinstance(model, LanguageModel):
            return model
        layers = getattr(getattr(model, "backbone", None), "layers", ())
        if not layers or not isinstance(layers[0].mixer, Hosted):
            raise UserError(f"this {type(model).__name__} does not run on our mixers",
                            "load it with mambacompress.load")
        return cls(adopt(model, prove=False))

    @property
    def vocabulary(self) -> int:
        return int(self.model_map.host.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model_map.final_norm.weight.device  # type: ignore[return-value]

    def prefill(self, ids_BL: Tensor, attention_mask: Tensor | None = None, states: States | None = None, *,
                seq_idx: Tensor | None = None, last_only: bool = False) -> tuple[Tensor, States]:
        """Read tokens, from ``states`` where given.

        ids: int64 [B, L]. attention_mask: [B, L], 0 at left padding. seq_idx: [B, L] integers; a change starts a new
        sequence (packed batches). Returns the logits, fp32 [B, L, V] ([B, 1, V] where ``last_only``), and a state a
        block.
        """
        h_BLD = self.embed(ids_BL)
        if states is not None and ids_BL.shape[1] == 1 and attention_mask is None and seq_idx is None:
            stepped = self._step(h_BLD[:, 0], states)
            if stepped is not None:
                return self.logits(stepped[0][:, None]), stepped[1]
        else:
            self._begins = True
            if attention_mask is None and seq_idx is None:
                read = self._prefill(h_BLD, states)
                if read is not None:
                    return self.logits(read[0][:, -1:] if last_only else read[0]), read[1]
        new_states: States = []
        for i, block in enumerate(self.model_map.blocks):
            h_BLD, state = self._block(block, h_BLD, None if states is None else states[i], attention_mask, seq_idx)
            new_states.append(state)
        return self.logits(h_BLD[:, -1:] if last_only else h_BLD), new_states

    def step(self, ids_B: Tensor, states: States) -> tuple[Tensor, States]:
        """One token a row: ids int64 [B] -> (logits fp32 [B, V], new states; the old ones stay valid)."""
        logits_B1V, states = self.prefill(ids_B[:, None], None, states)
        return logits_B1V[:, 0], states

    def embed(self, ids: Tensor) -> Tensor:
        """The residual that ids [...] start with, [..., D]: in fp32 where the blocks keep it so."""
        h_D = self.model_map.embedding.module(ids)
        if h_D.dtype in (torch.float32, torch.float64):  # looking at every block costs a token's time
            return h_D
        return h_D.float() if all(block.module.residual_in_fp32 for block in self.model_map.blocks) else h_D

    def logits(self, h_BLD: Tensor) -> Tensor:
        """Final norm and head on the residual [B, L, D]: fp32 (fp64 for an fp64 model)."""
        head = self.model_map.head.module
        dtype = head.dtype if isinstance(head, Stored) else head.get_parameter("weight").dtype
        h_BLD = self.model_map.final_norm(h_BLD).to(dtype)
        if type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks):
            logits_BLV = linear(h_BLD, head.weight, head.bias)
        else:
            logits_BLV = head(h_BLD)
        return logits_BLV if logits_BLV.dtype == torch.float64 else logits_BLV.float()

    @staticmethod
    def _block(block: Block, h_BLD: Tensor, state: MixerState | None, mask: Tensor | None,
               seq_idx: Tensor | None) -> tuple[Tensor, MixerState]:
        norm = block.norm
        x_BLD = norm(h_BLD.to(norm.weight.dtype))  # type: ignore[arg-type]
        if block.module.residual_in_fp32 and h_BLD.dtype != torch.float64:
            h_BLD = h_BLD.float()
        y_BLD, new_state = block.mixer.mix(x_BLD, state, mask, seq_idx)
        if new_state is None:
            raise TypeError(f"block {block.index} has no state: it is not causal")
        return h_BLD + y_BLD, new_state

    # -- the fused step ----------------------------------------------------------------------------------------------

    def _step(self, h_BD: Tensor, states: States) -> tuple[Tensor, States] | None:
        """The blocks' decode step in one native call, into new states; None where it does not take this call."""
        fused, old = self.fused(h_BD), native_states(states)
        if fused is None or old is None:
            return None
        h_BD, new = h_BD.clone(memory_format=torch.contiguous_format), next_states(old)
        fused.run(h_BD, NativeStates(old, new))
        return h_BD, [MixerState(*state) for state in new]

    def _prefill(self, h_BLD: Tensor, states: States | None) -> tuple[Tensor, States] | None:
        """The blocks' prefill in one native call; None where it does not take this call."""
        why = obstacle(h_BLD, 1)
        if not why and h_BLD.shape[1] and all(isinstance(state.ssm, Tensor) for state in states or []):
            fused, old = self._current(), None if states is None else native_states(states)
            why = fused.prefill_why
            if (states is None or old is not None) and chosen(h_BLD, why, "mixer_prefill"):
                h_BLD = h_BLD.clone(memory_format=torch.contiguous_format)
                return h_BLD, [MixerState(*state) for state in fused.prefill(h_BLD, old)]
        return None

    def fused(self, h_BD: Tensor) -> FusedBlocks | None:
        """The blocks as one native call for a residual like h; None where single ops must run (noted, with why)."""
        why = obstacle(h_BD, len(h_BD)) or self._current().why
        return self._fused if chosen(h_BD, why) else None

    def _current(self) -> FusedBlocks:
        """The blocks' native description as they are now."""
        fused = self._fused
        if fused is None or not fused.holds() or (self._begins and not fused.unchanged()):
            fused = self._fused = self._fuse()
        self._begins = False
        return fused

    def _fuse(self) -> FusedBlocks:
        modules = [block.module for block in self.model_map.blocks]
        plans = [block.mixer.plans.get(block.mixer, block.norm, look=True) for block in self.model_map.blocks
                 if isinstance(block.mixer, Hosted)]
        return FusedBlocks(plans, modules)


class Decoder:
    """A sequence (or a batch of them) that is only ever continued: its states are its own, and overwritten.

    states: what a prefill returned; they are not changed, but replaced by the first step. state: ``fp32``, or ``int8``
    to round the recurrent states now and at every step (``kernels.int8_state``). Whether parts of the model were
    replaced is looked at once, when the first step comes: looking takes as long as a block does. An edit in the middle
    of a sequence is for ``LanguageModel.step``, or another decoder.
    """

    def __init__(self, lm: LanguageModel, states: States, state: str = "fp32") -> None:
        check_state_format(state)
        self.lm = lm
        self.states = [s.int8() for s in states] if state == "int8" else states
        self._native: NativeStates | None = None  # self.states, in place
        self._fused: FusedBlocks | None = None
        self._graph: GraphedStep | None = None  # on a GPU
        self._looked = False  # whether a graph was thought of

    def step(self, ids_B: Tensor) -> Tensor:
        """One token a row: ids int64 [B] -> logits, fp32 [B, V]."""
        lm = self.lm
        if not self._looked:
            self._looked, self._graph = True, graphed(lm.step, lm.model_map.host, ids_B, self.states)
            self.states = self.states if self._graph is None else self._graph.states
        if self._graph is not None:
            return self._graph(ids_B)
        h_BD = lm.embed(ids_B)
        fused = self._fused
        if fused is None or not chosen(h_BD, obstacle(h_BD, len(h_BD))):
            fused = self._fused = lm.fused(h_BD)
        if fused is None or (self._native is None and native_states(self.states) is None):
            self._native = None
            logits_BV, self.states = lm.step(ids_B, self.states)
            return logits_BV
        h_BD = h_BD.clone(memory_format=torch.contiguous_format)
        if self._native is None:
            old = native_states(self.states) or []
            new = next_states(old, lasting=True)
            fused.run(h_BD, NativeStates(old, new))
            self.states, self._native = [MixerState(*state) for state in new], NativeStates(new, new)
        else:
            fused.run(h_BD, self._native)
        return lm.logits(h_BD[:, None])[:, 0]


def stream(model: Any, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
           top_p: float | None = None, eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
           seed: int | None = 0, attention_mask: Tensor | None = None, state: str = "fp32") -> Iterator[Tensor]:
    """Continue every row of ``input_ids``, one step at a time; yields the new ids, int64 [B], as they are made.

    model: a LanguageModel or an adopted host. input_ids: int64 [B, L], L at least 1; attention_mask: [B, L], 0 at
    padding, which must lie on the left. temperature 0 is greedy; otherwise logits / temperature, cut to the ``top_k``
    largest and then to the smallest set that holds ``top_p`` of the probability. A row that made one of
    ``eos_token_id`` (the model's own where None) gives ``pad_token_id`` (the first eos where None) from then on; the
    stream ends when all rows have. seed: of the draws; None for a new one each time. state: ``int8`` keeps the
    recurrent states of all steps behind the prompt in a quarter to a third of the memory, rounded at every step.

    Raises UserError for arguments that cannot work, before the first step.
    """
    lm = LanguageModel.of(model)
    check_state_format(state)
    _check(lm, input_ids, max_new_tokens, temperature, top_k, top_p, attention_mask)
    ends = _end_ids(lm, eos_token_id)
    pad = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    sample = _sampler(temperature, top_k, top_p, seed)
    return _steps(lm, input_ids, max_new_tokens, sample, ends, pad, attention_mask, state)


def generate(model: Any, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, eos_token_id: int | Sequence[int] | None = None,
             pad_token_id: int | None = None, seed: int | None = 0, attention_mask: Tensor | None = None,
             state: str = "fp32", on_token: Callable[[Tensor], None] | None = None) -> Tensor:
    """``stream`` gathered: the prompts with what follows them, int64 [B, L + new], new at most ``max_new_tokens``.

    on_token: called with each step's ids [B].
    """
    made = []
    for ids_B in stream(model, input_ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                        eos_token_id=eos_token_id, pad_token_id=pad_token_id, seed=seed, attention_mask=attention_mask,
                        state=state):
        made.append(ids_B)
        if on_token is not None:
            on_token(ids_B)
    return torch.cat([input_ids, torch.stack(made, 1).to(input_ids.device)], 1) if made else input_ids


def _steps(lm: LanguageModel, input_ids: Tensor, count: int, sample: Sampler, ends: list[int], pad: int,
           attention_mask: Tensor | None, state: str) -> Iterator[Tensor]:
    ids_BL = input_ids.to(lm.device)
    mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(lm.device)
    end_ids = set(ends)
    running = [True] * len(ids_BL)
    decoder: Decoder | None = None
    ids_B = ids_BL[:, -1]
    for _ in range(count):
        with torch.no_grad():
            if decoder is None:
                logits_B1V, states = lm.prefill(ids_BL, mask, last_only=True)
                decoder, logits_BV = Decoder(lm, states, state), logits_B1V[:, -1]
            else:
                logits_BV = decoder.step(ids_B)
            ids_B = sample(logits_BV)
        if end_ids:
            made = ids_B.tolist()
            if not all(running):
                made = [token if runs else pad for token, runs in zip(made, running, strict=True)]
                ids_B = torch.tensor(made, dtype=torch.int64, device=lm.device)
            running = [runs and token not in end_ids for token, runs in zip(made, running, strict=True)]
        yield ids_B
        if not any(running):
            return


def _sampler(temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> Sampler:
    """logits [B, V] -> ids [B]."""
    if temperature == 0:
        return _greedy
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logits_BV: Tensor) -> Tensor:
        draws_B1 = torch.rand(len(logits_BV), 1, generator=generator, dtype=torch.float64).to(logits_BV.device)
        p_BV, order_BV = torch.softmax(logits_BV.double() / temperature, -1), None
        if top_k is not None:
            p_BV, order_BV = p_BV.topk(min(top_k, p_BV.shape[-1]))
        elif top_p is not None:
            p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        if top_p is not None:
            total_BV = p_BV.cumsum(-1)
            p_BV = p_BV.masked_fill(total_BV - p_BV >= top_p * total_BV[:, -1:], 0)
        total_BV = p_BV.cumsum(-1)
        last_B1 = (total_BV < total_BV[:, -1:]).sum(-1, keepdim=True)  # where rounding could step over the end
        place_B1 = torch.searchsorted(total_BV, draws_B1 * total_BV[:, -1:], right=True).minimum(last_B1)
        return (place_B1 if order_BV is None else order_BV.gather(-1, place_B1))[:, 0]

    return sample


def _greedy(logits_BV: Tensor) -> Tensor:
    """The first of the largest, as torch's argmax, at a tenth of its time on a processor."""
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    return torch.from_numpy(logits_BV.numpy().argmax(-1))


def _end_ids(lm: LanguageModel, asked: int | Sequence[int] | None) -> list[int]:
    host = lm.model_map.host
    if asked is None:
        generation = getattr(host, "generation_config", None)
        asked = getattr(generation, "eos_token_id", None) if generation is not None else None
        asked = getattr(host.config, "eos_token_id", None) if asked is None else asked
    if asked is None:
        return []
    return [asked] if isinstance(asked, int) else list(asked)


def check_state_format(state: str) -> None:
    """Raise UserError where there is no such format."""
    if state not in STATE_FORMATS:
        raise UserError(f"the state format is {state!r}", f"give one of {', '.join(STATE_FORMATS)}")


def _check(lm: LanguageModel, ids: Tensor, count: int, temperature: float, top_k: int | None, top_p: float | None,
           mask: Tensor | None) -> None:
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise UserError(f"the prompt is {ids.dtype} of shape {list(ids.shape)}",
                        "give int64 token ids [B, L], L at least 1")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < lm.vocabulary:
        raise UserError(f"the prompt holds token ids outside the vocabulary of {lm.vocabulary}",
                        "use the model's own tokenizer")
    if count < 0:
        raise UserError(f"max_new_tokens is {count}", "ask for 0 or more")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}", "give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}", "give at least 1, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}", "give more than 0 and at most 1, or leave it out")
    if mask is not None:
        if mask.shape != ids.shape:
            raise UserError(f"the attention mask has shape {list(mask.shape)}, the prompt {list(ids.shape)}",
                            "give one number a token")
        if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
            raise UserError("the prompts are padded on the right",
                            "pad them on the left: tokenizer.padding_side = 'left'")


__all__ = ["Decoder", "LanguageModel", "States", "generate", "stream"]
