"""From logits to tokens: penalties, bias and bans, log probabilities, and the draw.

Sampling settings live on the device in a table with a row for each running sequence (its slot), written once when
the sequence is admitted; a step only names the slots of its rows. Counts for penalties are updated on the device
too, so that a step can be launched before the last one's tokens have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.model.build import Build
from plexor.runtime.packer import NewSequence
from plexor.runtime.request import SamplingParams

COLDEST = 1e-5
"""Below this temperature logits would overflow when divided by it; the draw is then the likeliest token, its limit."""


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Log probabilities of the rows that asked for them.

    rows [n]: which rows of the step. most [n]: how many of the likeliest each wants. drawn [n], rank [n]: of the drawn
    token. values, token_ids [n, k]: the likeliest, best first.
    """

    rows: list[int]
    most: list[int]
    drawn: Tensor
    rank: Tensor
    values: Tensor
    token_ids: Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """One step's tokens, still on the device. ids [R] int64."""

    ids: Tensor
    logprobs: LogprobRows | None


class Sampler:
    """Holds the settings of every slot and draws the tokens of a step."""

    def __init__(self, build: Build, num_slots: int, vocab_size: int) -> None:
        device = build.device
        self._device = device
        self._vocab_size = vocab_size
        self._sample = build.bind("sample", vocab_size=vocab_size)
        self._temperature = torch.ones(num_slots, device=device)
        self._top_k = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._top_p = torch.ones(num_slots, device=device)
        self._min_p = torch.zeros(num_slots, device=device)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._params: dict[int, SamplingParams] = {}
        self._bans: dict[int, Tensor] = {}
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._history: dict[int, _History] = {}

    def admit(self, new: NewSequence) -> None:
        """Take over a slot for a sequence that starts, or starts again after preemption."""
        slot, params = new.slot, new.sampling
        self._params[slot] = params
        self._temperature[slot] = params.temperature if params.temperature >= COLDEST else 0.0
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = new.seed
        for table in (self._bans, self._bias, self._history):
            table.pop(slot, None)
        if params.min_tokens:
            banned = [*params.stop_token_ids, *(() if params.ignore_end else new.end_ids)]
            drawable = [token_id for token_id in banned if token_id < self._vocab_size]  # a checkpoint may name others
            self._bans[slot] = torch.tensor(drawable, dtype=torch.int64, device=self._device)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self._device)
            self._bias[slot] = (ids, torch.tensor(list(params.logit_bias.values()), device=self._device))
        if _penalises(params):
            self._history[slot] = _History(new, self._vocab_size, self._device)

    def draw(self, logits: Tensor, slots: Sequence[int], steps: Sequence[int]) -> Drawn:
        """logits [R, V], slots and steps (index of the drawn token in its answer) of each row."""
        logits = logits.float()
        adjusted = self._adjust(logits, slots, steps)
        index = torch.tensor(slots, dtype=torch.int64, device=self._device)
        ids: Tensor = self._sample(
            adjusted,
            self._temperature[index],
            self._top_k[index],
            self._top_p[index],
            self._min_p[index],
            self._seeds[index],
            torch.tensor(steps, dtype=torch.int64, device=self._device),
        )
        for row, slot in enumerate(slots):
            if slot in self._history:
                self._history[slot].add(ids[row])
        return Drawn(ids, self._logprobs(logits, ids, slots))

    def _adjust(self, logits: Tensor, slots: Sequence[int], steps: Sequence[int]) -> Tensor:
        """A copy with penalties, bias and bans where a row has any; the logits themselves where none has."""
        touched = [
            row
            for row, slot in enumerate(slots)
            if slot in self._history or slot in self._bias or self._is_banning(slot, steps[row])
        ]
        if not touched:
            return logits
        adjusted = logits.clone()
        for row in touched:
            slot = slots[row]
            if slot in self._history:
                self._history[slot].penalise(adjusted[row], self._params[slot])
            if slot in self._bias:
                ids, bias = self._bias[slot]
                adjusted[row].index_add_(0, ids, bias)
            if self._is_banning(slot, steps[row]):
                adjusted[row].index_fill_(0, self._bans[slot], float("-inf"))
        return adjusted

    def _is_banning(self, slot: int, step: int) -> bool:
        return slot in self._bans and step < self._params[slot].min_tokens

    def _logprobs(self, logits: Tensor, ids: Tensor, slots: Sequence[int]) -> LogprobRows | None:
        """Of the model's own distribution, before temperature, penalties and cuts."""
        rows = [row for row, slot in enumerate(slots) if self._params[slot].logprobs is not None]
        if not rows:
            return None
        most = [self._params[slots[row]].logprobs or 0 for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        values = logits[index].log_softmax(dim=-1)
        drawn = values.gather(1, ids[index].unsqueeze(1))
        rank = (values >= drawn).sum(dim=1)
        top = values.topk(min(max(most), self._vocab_size), dim=1)
        return LogprobRows(rows, most, drawn.squeeze(1), rank, top.values, top.indices)


class _History:
    """What a penalised sequence has seen and said: seen [V] bool, said [V] how often."""

    def __init__(self, new: NewSequence, vocab_size: int, device: torch.device) -> None:
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._said = torch.zeros(vocab_size, device=device)
        self._seen[torch.tensor([*new.prompt_ids, *new.generated_ids], dtype=torch.int64, device=device)] = True
        for token_id in new.generated_ids:
            self._said[token_id] += 1

    def add(self, token_id: Tensor) -> None:
        """token_id: a scalar on the device."""
        self._seen[token_id] = True
        self._said[token_id] += 1

    def penalise(self, row: Tensor, params: SamplingParams) -> None:
        """Repetition (Keskar et al., 2019) over prompt and answer; presence and frequency over the answer alone."""
        if params.repetition_penalty != 1.0:
            scaled = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row.copy_(torch.where(self._seen, scaled, row))
        row -= params.frequency_penalty * self._said + params.presence_penalty * (self._said > 0)


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
