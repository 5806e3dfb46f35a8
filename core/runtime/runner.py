"""One rank's work on a step: numbers to the device, media to embeddings, forward, logits, drawn tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache, MediaRows, Pages, Prefill
from plexor.errors import RequestError
from plexor.model.media import MediaModel
from plexor.runtime.capture import Captures, DrawnRows, GraphMemory
from plexor.runtime.graphs import DecodeSteps
from plexor.runtime.loading import BuiltModel
from plexor.runtime.packer import MediaSpan, SequenceMedia, StepInput
from plexor.runtime.pieces import PieceSteps
from plexor.runtime.request import TokenLogprobs
from plexor.runtime.sampler import LogprobRows, Sampler
from plexor.runtime.state import SlotState, send

REDRAWN = 64
"""Rows whose logits are changed together: each takes several times its logits of memory meanwhile."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A launched step whose tokens are on their way to the CPU. ids [R]; logprobs of the rows that asked for them."""

    ids: Tensor
    logprobs: LogprobRows | None
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """The drawn ids [R], and their log probabilities where a row asked for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids: list[int] = self.ids.tolist()
        rows = self.logprobs
        return ids, None if rows is None else _read_logprobs(rows, ids)


class Runner:
    """Holds the model, its cache and the state of running sequences; steps are launched in order.

    buckets: numbers of rows that decode steps are padded to, as `DecodeSteps` takes them, so that they can be captured;
    with any, short steps with pieces of prompts are padded, too.
    """

    def __init__(
        self,
        built: BuiltModel,
        cache: tuple[LayerCache, ...],
        *,
        num_slots: int,
        max_blocks: int,
        block_size: int,
        buckets: Sequence[int] = (),
    ) -> None:
        build = built.build
        self._model = built.model
        self._device = build.device
        self._cache = cache
        self._state = SlotState(build, num_slots, max_blocks, block_size)
        self._sampler = Sampler(build, built.config.vocab_size, self._state.tokens)
        memory = GraphMemory(self._device) if buckets and self._device.type == "cuda" else None
        reports = build.mesh.rank == 0
        self._decodes = DecodeSteps(
            built.model,
            cache,
            self._state,
            self._sampler,
            buckets=buckets,
            captures=Captures("decode steps", memory, reports=reports),
        )
        self._pieces = PieceSteps(
            built.model,
            cache,
            self._state,
            self._sampler,
            captures=Captures("steps of short prompts", memory, reports=reports) if buckets else None,
        )
        self._decoding: list[int] | None = None  # the slots that the decode steps' rows stand for
        self._media: dict[tuple[int, int], SequenceMedia] = {}
        self._encoded: dict[tuple[int, int], Tensor] = {}
        self.watch_logits: Callable[[Tensor], None] | None = None
        """Called with the logits [R, V] of each step; they are valid until the next one is launched."""

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Pending:
        """Queue the step on the device; returns before it has run (on a GPU)."""
        for new in step.new:
            self._sampler.admit(new)
            self._admit_media(new.slot, new.media)
            self._decoding = None
        if step.pieces:
            slots = [*step.decodes, *(piece.slot for piece in step.pieces if piece.draws >= 0)]
            drawn = self._pieces.run(step, self._media_rows(step.media))
        else:
            slots, drawn = step.decodes, self._run_decodes(step)
        if self.watch_logits is not None:
            self.watch_logits(drawn.logits[: len(slots)])
        return self._send_back(*self._finish(slots, drawn))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits [T, V] of one sequence in the first blocks of a cache that nothing else uses."""
        return self._model.logits(self._hidden(token_ids))

    @torch.inference_mode()
    def logit_parts(self, token_ids: Sequence[int], num_rows: int) -> Iterator[Tensor]:
        """What `logits` gives, num_rows rows at a time, so that [T, V] is never there as a whole."""
        for hidden in self._hidden(token_ids).split(num_rows):
            yield self._model.logits(hidden)

    @torch.inference_mode()
    def warm_up(self, num_rows: int) -> None:
        """Compile, plan and capture what steps of up to so many rows run; before the first step."""
        self._decodes.warm_up()
        self._pieces.warm_up(num_rows)

    def close(self) -> None:
        """No step is launched from now on."""
        self._decodes.close()
        self._pieces.close()

    def _hidden(self, token_ids: Sequence[int]) -> Tensor:
        """The model's output [T, H] before the head, of one sequence in the first blocks of the cache."""
        count = len(token_ids)
        block_size = self._state.block_size
        positions = torch.arange(count, device=self._device)
        pages = Pages(
            query_start=torch.tensor([0, count], dtype=torch.int32, device=self._device),
            kv_length=torch.tensor([count], dtype=torch.int32, device=self._device),
            block_table=torch.arange(-(-count // block_size), dtype=torch.int32, device=self._device).unsqueeze(0),
            max_query=count,
            prefills=(Prefill(0, 0, count, count),),
        )
        ctx = ForwardContext(pages, positions, None, self._cache)
        batch = Batch(torch.tensor(token_ids, dtype=torch.int64, device=self._device), positions)
        return self._model.forward(batch, ctx)

    def _run_decodes(self, step: StepInput) -> DrawnRows:
        """A step of decodes alone, which needs nothing of the CPU but what has changed since the last one."""
        is_new = step.decodes != self._decoding
        rows = self._decodes.arrays(step.decodes) if is_new else []
        blocks = self._state.new_blocks(step.blocks) if step.blocks else ()
        if rows or blocks:
            sent, arrays = send([*rows, *blocks], self._device)
            if is_new:
                self._decodes.take_rows(sent)
                self._decoding = step.decodes
            if blocks:
                self._state.write_blocks(*arrays[len(rows) :])
        return self._decodes.run(len(step.decodes))

    def _finish(self, slots: Sequence[int], drawn: DrawnRows) -> tuple[Tensor, LogprobRows | None]:
        """The step's ids [R], drawn again where a row changes its logits, and the log probabilities asked for."""
        ids = drawn.ids[: len(slots)]
        changed = self._sampler.changed_rows(slots)
        for start in range(0, len(changed), REDRAWN):
            some = changed[start : start + REDRAWN]
            rows, again = self._sampler.redraw(drawn.logits, some, slots, drawn.settings, drawn.steps)
            ids = ids.index_copy(0, rows, again)
        return ids, self._sampler.logprobs(drawn.logits, ids, slots)

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
            items = [self._on_device(self._media[key].array()) for key in wanted]
            self._encoded.update(zip(wanted, self._model.encode(kind, items), strict=True))

    def _on_device(self, array: numpy.ndarray) -> Tensor:
        """A copy on its way; from memory that is not pinned, the CPU would wait for the steps before."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _send_back(self, ids: Tensor, logprobs: LogprobRows | None) -> Pending:
        if self._device.type != "cuda":
            return Pending(ids, logprobs, None)
        if logprobs is not None:
            logprobs = replace(
                logprobs,
                drawn=_landing(logprobs.drawn),
                rank=_landing(logprobs.rank),
                values=_landing(logprobs.values),
                token_ids=_landing(logprobs.token_ids),
            )
        landing = _landing(ids)
        arrived = torch.cuda.Event()
        arrived.record()
        return Pending(landing, logprobs, arrived)


def _landing(tensor: Tensor) -> Tensor:
    """A copy in memory that the device writes to while the CPU goes on."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _read_logprobs(rows: LogprobRows, ids: Sequence[int]) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(ids)
    drawn, ranks = rows.drawn.tolist(), rows.rank.tolist()
    values, top_ids = rows.values.tolist(), rows.token_ids.tolist()
    for i, row in enumerate(rows.rows):
        top = tuple(zip(top_ids[i], values[i], strict=True))[: rows.most[i]]
        found[row] = TokenLogprobs(ids[row], drawn[i], ranks[i], top)
    return found
