"""What travels between the front end and the engine process: msgspec structs as msgpack bytes, and nothing else.

    front end                          engine process
              <- Loading, Ready | Failed
    Submit ->
              <- Refused | Outputs, Outputs, …
    Finish ->
    Stop   ->

The bytes are decoded against these types, so that nothing in them can name code.
"""

from __future__ import annotations

import msgspec
import numpy

from plexor.runtime.request import FinishReason, Media, Output, Request, SamplingParams
from plexor.runtime.stats import StepStats


class WireMedia(msgspec.Struct, frozen=True, kw_only=True):
    """A `Media` whose content is bytes; dtype is numpy's name of it, such as "<f4"."""

    kind: str
    start: int
    length: int
    digest: bytes
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class WireRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A `Request`; `arrived` is on the monotonic clock, which the processes of one machine share."""

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    end_ids: tuple[int, ...]
    media: tuple[WireMedia, ...]
    arrived: float
    cache_salt: bytes


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run these requests, all of them or none; id names the lot in `Refused`."""

    id: str
    requests: tuple[WireRequest, ...]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """End a request now: its client has left ("abort"), or a stop string was found ("stop")."""

    id: str
    reason: FinishReason
    stop_reason: str | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the engine process."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the weights that have been read, of how many."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded. These are the fields of EngineLimits."""

    max_length: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_sequences: int

    @property
    def room(self) -> int:
        """Tokens that one request may have, prompt and answer together."""
        return min(self.max_length, self.num_blocks * self.block_size)


class Refused(msgspec.Struct, frozen=True, tag=True):
    """None of a Submit's requests runs, because one of them cannot be served."""

    id: str
    message: str
    field: str | None


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step gave. stats: None where no step was launched."""

    outputs: tuple[Output, ...]
    stats: StepStats | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine process ends. message: for whoever runs the server, not for its clients."""

    message: str


ToEngine = Submit | Finish | Stop
FromEngine = Loading | Ready | Refused | Outputs | Failed


def encode(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """What the front end sent; msgspec.DecodeError or ValidationError for anything else."""
    message: ToEngine = msgspec.msgpack.decode(data, type=ToEngine)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """What the engine process sent; msgspec.DecodeError or ValidationError for anything else."""
    message: FromEngine = msgspec.msgpack.decode(data, type=FromEngine)
    return message


def to_wire(request: Request) -> WireRequest:
    """A request in the form that travels."""
    return WireRequest(
        id=request.id,
        tokens=request.tokens,
        sampling=request.sampling,
        end_ids=request.end_ids,
        media=tuple(_media_to_wire(medium) for medium in request.media),
        arrived=request.arrived,
        cache_salt=request.cache_salt,
    )


def from_wire(request: WireRequest) -> Request:
    """The request as the engine takes it."""
    return Request(
        request.id,
        request.tokens,
        request.sampling,
        request.end_ids,
        tuple(_media_from_wire(medium) for medium in request.media),
        request.arrived,
        request.cache_salt,
    )


def _media_to_wire(medium: Media) -> WireMedia:
    array = numpy.ascontiguousarray(numpy.asarray(medium.data))
    return WireMedia(
        kind=medium.kind,
        start=medium.start,
        length=medium.length,
        digest=medium.digest,
        dtype=array.dtype.str,
        shape=array.shape,
        data=array.tobytes(),
    )


def _media_from_wire(medium: WireMedia) -> Media:
    array = numpy.frombuffer(bytearray(medium.data), dtype=medium.dtype).reshape(medium.shape)
    return Media(medium.kind, medium.start, medium.length, medium.digest, array)
