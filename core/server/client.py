"""The front end's side of the engine process: starts it, watches it, sends requests and follows their answers."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import msgspec
import zmq
import zmq.asyncio

from plexor.config import EngineConfig
from plexor.errors import ConfigError, PlexorError, RequestError
from plexor.runtime.prompts import Answer, Delta, PromptDesk
from plexor.runtime.request import FinishReason, Output, Request
from plexor.server.errors import EngineStoppedError
from plexor.server.metrics import Metrics
from plexor.server.process import serve_engine
from plexor.server.wire import (
    Failed,
    Finish,
    Loading,
    Outputs,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
    to_wire,
)

LAST_WORDS_SECONDS = 0.2
"""How long a dead engine's last message may still be on its way."""

STOP_SECONDS = 5.0
"""How long the engine process may take to end by itself."""

MAX_ADDRESS = 100
"""Bytes of a socket's path that every Linux takes."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step added to one answer. index: of the answer among those of its group."""

    index: int
    delta: Delta
    output: Output


class Group:
    """The answers to one HTTP request while they come; made by `EngineClient.submit`."""

    def __init__(self, group_id: str, requests: Sequence[Request], end: Callable[[str, FinishReason], None]) -> None:
        self.id = group_id
        self.requests = tuple(requests)
        self._open = {request.id for request in requests}
        self._end = end
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._first: Event | None = None

    async def wait(self) -> Event:
        """The first event, as soon as it is there; `events` will give it again.

        Raises RequestError if the engine refused the requests, EngineStoppedError if it is gone.
        """
        self._first = await self._next()
        return self._first

    async def events(self) -> AsyncIterator[Event]:
        """Everything up to the end of the last answer; errors as in `wait`."""
        num_open = len(self.requests)
        while num_open:
            event = self._first if self._first is not None else await self._next()
            self._first = None
            num_open -= event.delta.finish is not None
            yield event

    def abort(self) -> None:
        """Ends in the engine what has not ended; for a client that has left."""
        for request_id in tuple(self._open):
            self._end(request_id, "abort")
        self._open.clear()

    def put(self, event: Event) -> None:
        """The client's reader brings an event."""
        if event.delta.finish is not None:
            self._open.discard(self.requests[event.index].id)
        self._queue.put_nowait(event)

    def fail(self, error: Exception) -> None:
        """The client's reader says that nothing more comes."""
        self._open.clear()
        self._queue.put_nowait(error)

    async def _next(self) -> Event:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(slots=True)
class _Live:
    """A request under way. told: when its last token came, on the monotonic clock."""

    request: Request
    answer: Answer
    group: Group
    index: int
    num_tokens: int = 0
    told: float = 0.0


class EngineClient:
    """One engine process. Use `start` before and `close` after everything else."""

    def __init__(self, config: EngineConfig, desk: PromptDesk, metrics: Metrics) -> None:
        self._config = config
        self._desk = desk
        self._metrics = metrics
        self._live: dict[str, _Live] = {}
        self._groups: dict[str, Group] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._process: BaseProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[Ready] | None = None
        self._limits: Ready | None = None
        self.died = asyncio.Event()
        self.failure: str | None = None

    @property
    def limits(self) -> Ready:
        """What the engine has room for; known after `start`."""
        assert self._limits is not None, "the engine has not started"
        return self._limits

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._limits is not None and not self.died.is_set()

    @property
    def num_live(self) -> int:
        """Answers that have not ended."""
        return len(self._live)

    async def start(self, progress: Callable[[int, int], None]) -> Ready:
        """Start the process and wait until the model is loaded; PlexorError if it cannot be."""
        loop = asyncio.get_running_loop()
        self._folder = tempfile.TemporaryDirectory(prefix="plexor-")  # for this user alone
        address = f"ipc://{self._folder.name}/engine"
        if len(address) > MAX_ADDRESS:
            raise ConfigError(
                f"the folder for temporary files gives a socket a path of {len(address)} characters, and at most "
                f"{MAX_ADDRESS} are possible: set TMPDIR to a shorter one"
            )
        self._socket.bind(address)
        self._ready = loop.create_future()
        context = multiprocessing.get_context("spawn")
        # Not a daemon: those may not have the processes of further ranks as children. `close` ends it.
        self._process = context.Process(
            target=serve_engine, args=(address, msgspec.json.encode(self._config)), name="engine"
        )
        self._process.start()
        loop.add_reader(self._process.sentinel, self._on_exit)
        self._tasks.append(asyncio.create_task(self._read(progress)))
        self._limits = await self._ready
        return self._limits

    def submit(self, group_id: str, requests: Sequence[Request]) -> Group:
        """Ask for answers to these requests, all of them or none; EngineStoppedError if the engine is gone."""
        if not self.is_alive:
            raise EngineStoppedError()
        group = Group(group_id, requests, self._finish)
        for index, request in enumerate(requests):
            self._live[request.id] = _Live(request, self._desk.follow(request), group, index)
        self._groups[group_id] = group
        self._send(Submit(group_id, tuple(to_wire(request) for request in requests)))
        return group

    def abort_all(self) -> None:
        """End every request; each still gets its last event."""
        for request_id in tuple(self._live):
            self._send(Finish(request_id, "abort"))

    async def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        for task in self._tasks:
            task.cancel()
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.sentinel)
            await self._stop(self._process)
        self._context.destroy(linger=0)
        if self._folder is not None:
            self._folder.cleanup()

    async def _stop(self, process: BaseProcess) -> None:
        if process.is_alive():
            with contextlib.suppress(zmq.Again):
                await self._socket.send(encode(Stop()), zmq.NOBLOCK)
            deadline = time.monotonic() + STOP_SECONDS
            while process.is_alive() and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        if process.is_alive():
            process.kill()
        process.join()
        process.close()

    def _send(self, message: ToEngine) -> None:
        if not self.died.is_set():
            self._socket.send(encode(message))

    async def _read(self, progress: Callable[[int, int], None]) -> None:
        try:
            while True:
                match decode_from_engine(await self._socket.recv()):
                    case Outputs(outputs, stats):
                        if stats is not None:
                            self._metrics.on_step(stats)
                            self._on_started(stats.started)
                        self._on_outputs(outputs)
                    case Refused(group_id, message, field):
                        self._refuse(group_id, RequestError(message, field))
                    case Loading(done, total):
                        progress(done, total)
                    case Ready() as ready:
                        assert self._ready is not None
                        self._ready.set_result(ready)
                    case Failed(message):
                        self._die(message)
        except Exception as error:
            self._die(f"the front end could not read what the engine sent ({type(error).__name__}: {error})")
            raise

    def _on_started(self, request_ids: Iterable[str]) -> None:
        now = time.monotonic()
        for request_id in request_ids:
            if (live := self._live.get(request_id)) is not None:
                self._metrics.on_start(now - live.request.arrived)

    def _on_outputs(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            live = self._live.get(output.id)
            delta = None if live is None else live.answer.push(output)
            if live is None or delta is None:
                continue  # the engine's last word on what has ended here already
            self._measure(live, delta)
            if delta.finish is not None:
                self._forget(live)
            if delta.ends_early:
                self._send(Finish(output.id, "stop", str(delta.stop_reason)))
            live.group.put(Event(live.index, delta, output))

    def _measure(self, live: _Live, delta: Delta) -> None:
        now, num_prompt = time.monotonic(), len(live.request.tokens)
        if delta.token_ids:
            if live.num_tokens == 0:
                self._metrics.on_first_token(now - live.request.arrived, num_prompt)
            else:
                self._metrics.on_next_token(now - live.told)
            self._metrics.on_tokens(len(delta.token_ids))
            live.num_tokens += len(delta.token_ids)
            live.told = now
        if delta.finish is not None:
            self._metrics.on_finish(delta.finish, now - live.request.arrived, num_prompt, live.num_tokens)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        """A group gives up one of its requests: nobody waits for its last output."""
        live = self._live.get(request_id)
        if live is None:
            return
        now = time.monotonic()
        self._metrics.on_finish(reason, now - live.request.arrived, len(live.request.tokens), live.num_tokens)
        self._forget(live)
        self._send(Finish(request_id, reason))

    def _refuse(self, group_id: str, error: RequestError) -> None:
        group = self._groups.get(group_id)
        if group is None:
            return
        for request in group.requests:
            if (live := self._live.get(request.id)) is not None:
                self._forget(live)
        group.fail(error)

    def _forget(self, live: _Live) -> None:
        del self._live[live.request.id]
        if not any(request.id in self._live for request in live.group.requests):
            self._groups.pop(live.group.id, None)

    def _on_exit(self) -> None:
        """The process has ended: let its last message come, then tell everybody."""
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._tasks.append(asyncio.create_task(self._after_exit(self._process)))

    async def _after_exit(self, process: BaseProcess) -> None:
        await asyncio.sleep(LAST_WORDS_SECONDS)
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._die(f"the engine process {how} without a word: look above for its own messages, and start again")

    def _die(self, message: str) -> None:
        if self.died.is_set():
            return
        self.died.set()
        self.failure = message
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(PlexorError(message))
            return
        print(f"plexor: {message}", file=sys.stderr)
        groups = tuple(self._groups.values())
        self._live.clear()
        self._groups.clear()
        for group in groups:
            group.fail(EngineStoppedError())
        self._metrics.on_engine_death()
