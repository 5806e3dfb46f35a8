"""One rank's work on a step: lists to tensors, media to embeddings, forward, logits, drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache, MediaRows, Pages
from plexor.errors import RequestError
from plexor.model.media import MediaModel
from plexor.runtime.loading import BuiltModel
from plexor.runtime.packer import MediaSpan, SequenceMedia, StepInput
from plexor.runtime.request import TokenLogprobs
from plexor.runtime.sampler import Drawn, LogprobRows, Sampler


@dataclass(frozen=True, slots=True)
class Pending:
    """A launched step whose tokens are on their way to the CPU."""

    drawn: Drawn
    ids: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """The drawn ids [R], and their log probabilities where a row asked for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids: list[int] = self.ids.tolist()
        rows = self.drawn.logprobs
        return ids, None if rows is None else _read_logprobs(rows, ids)


class Runner:
    """Holds the model, its cache and the state of running sequences; steps are launched in order."""

    def __init__(self, built: BuiltModel, cache: tuple[LayerCache, ...], num_slots: int) -> None:
        self._model = built.model
        self._device = built.build.device
        self._cache = cache
        self._sampler = Sampler(built.build, num_slots, built.config.vocab_size)
        self._drawn = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._media: dict[tuple[int, int], SequenceMedia] = {}
        self._encoded: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Pending:
        """Queue the step on the device; returns before it has run (on a GPU)."""
        for new in step.new:
            self._sampler.admit(new)
            self._admit_media(new.slot, new.media)
        logits = self.logits(step)
        drawn = Drawn(self._drawn[:0], None)
        if step.logit_rows:
            drawn = self._sampler.draw(logits, step.row_slots, step.row_steps)
        self._drawn = drawn.ids
        return self._send_back(drawn)

    @torch.inference_mode()
    def logits(self, step: StepInput) -> Tensor:
        """The forward of a step: [R, V] in the model's dtype."""
        ctx = self._context(step)
        return self._model.logits(self._model.forward(self._batch(step), ctx))

    def _batch(self, step: StepInput) -> Batch:
        token_ids = self._integers(step.token_ids)
        if any(row >= 0 for row in step.previous_rows):
            previous = self._integers(step.previous_rows)
            token_ids = torch.where(previous >= 0, self._drawn[previous.clamp(min=0)], token_ids)
        return Batch(token_ids, self._integers(step.positions), self._media_rows(step.media))

    def _context(self, step: StepInput) -> ForwardContext:
        widest = max(len(blocks) for blocks in step.block_table)
        table = [blocks + [0] * (widest - len(blocks)) for blocks in step.block_table]
        starts = step.query_start
        pages = Pages(
            query_start=self._integers(starts, torch.int32),
            kv_length=self._integers(step.kv_length, torch.int32),
            block_table=self._integers(table, torch.int32),
            max_query=max(end - start for start, end in pairwise(starts)),
        )
        return ForwardContext(pages, self._integers(step.slots), self._integers(step.logit_rows), self._cache)

    def _integers(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(self._device, non_blocking=True)

    def _admit_media(self, slot: int, media: Sequence[SequenceMedia]) -> None:
        for table in (self._media, self._encoded):
            for key in [key for key in table if key[0] == slot]:
                del table[key]
        self._media.update({(slot, medium.index): medium for medium in media})

    def _media_rows(self, spans: Sequence[MediaSpan]) -> tuple[MediaRows, ...]:
        self._encode([(span.slot, span.index) for span in spans])
        rows = []
        for span in spans:
            key = (span.slot, span.index)
            embeddings = self._encoded[key][span.first : span.first + span.count]
            rows.append(MediaRows(torch.arange(span.row, span.row + span.count, device=self._device), embeddings))
            if span.first + span.count == self._media[key].length:
                del self._encoded[key], self._media[key]
        return tuple(rows)

    def _encode(self, keys: Sequence[tuple[int, int]]) -> None:
        """Embeddings of the media that this step is the first to need; kept until their last row has been used."""
        by_kind: dict[str, list[tuple[int, int]]] = {}
        for key in keys:
            if key not in self._encoded:
                by_kind.setdefault(self._media[key].kind, []).append(key)
        for kind, wanted in by_kind.items():
            if not isinstance(self._model, MediaModel):
                raise RequestError(f"this model takes no {kind}: leave it out", field=kind)
            items = [torch.from_numpy(self._media[key].array()).to(self._device) for key in wanted]
            self._encoded.update(zip(wanted, self._model.encode(kind, items), strict=True))

    def _send_back(self, drawn: Drawn) -> Pending:
        if self._device.type != "cuda":
            return Pending(drawn, drawn.ids, None)
        ids = torch.empty(drawn.ids.shape, dtype=torch.int64, pin_memory=True)
        ids.copy_(drawn.ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Pending(drawn, ids, arrived)


def _read_logprobs(rows: LogprobRows, ids: Sequence[int]) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(ids)
    drawn, ranks = rows.drawn.tolist(), rows.rank.tolist()
    values, top_ids = rows.values.tolist(), rows.token_ids.tolist()
    for i, row in enumerate(rows.rows):
        top = tuple(zip(top_ids[i], values[i], strict=True))[: rows.most[i]]
        found[row] = TokenLogprobs(ids[row], drawn[i], ranks[i], top)
    return found
