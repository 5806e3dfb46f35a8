"""The engine process: takes requests from its socket between two steps, and sends back what each step gave."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING

import msgspec
import zmq

from plexor.config import EngineConfig
from plexor.errors import PlexorError, RequestError
from plexor.extension.catalog import Catalog
from plexor.runtime.prompts import find_folder
from plexor.runtime.request import Output
from plexor.runtime.startup import import_engine
from plexor.runtime.stats import StepStats
from plexor.server.wire import (
    Failed,
    Finish,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
    from_wire,
)

if TYPE_CHECKING:
    from plexor.runtime.core import EngineCore

PROGRESS_SECONDS = 0.1
"""Least time between two reports on loading."""

LINGER_MILLISECONDS = 2000
"""How long the last message may take to leave."""


def serve_engine(address: str, config_json: bytes) -> None:
    """The life of the engine process: load, say so, run until `Stop`; the exit code is 1 after a failure.

    address: an ipc:// address where the front end listens. config_json: an EngineConfig.
    """
    # The terminal and some supervisors send these to every process of a group; the front end decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_follow_parent, daemon=True).start()
    config = msgspec.json.decode(config_json, type=EngineConfig)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        _serve(socket, config)
    except PlexorError as error:
        _fail(socket, str(error))
    except Exception as error:
        traceback.print_exc()
        _fail(socket, f"the engine stopped at an error of its own ({type(error).__name__}: {error})")
    finally:
        context.destroy(linger=LINGER_MILLISECONDS)


def _serve(socket: zmq.Socket[bytes], config: EngineConfig) -> None:
    import_engine(config.device)
    from plexor.runtime.core import EngineCore  # not above: the front end, which imports this module, needs no torch

    catalog = Catalog.load(strict=config.strict_plugins)
    core = EngineCore(config, catalog, find_folder(config, catalog), _Progress(socket))
    try:
        limits = core.limits
        ready = Ready(
            max_length=limits.max_length,
            vocab_size=limits.vocab_size,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_sequences=limits.max_sequences,
        )
        socket.send(encode(ready))
        _EngineLoop(core, socket).run()
    finally:
        core.close()


def _fail(socket: zmq.Socket[bytes], message: str) -> None:
    socket.send(encode(Failed(message)))
    socket.close(linger=LINGER_MILLISECONDS)
    raise SystemExit(1)


def _follow_parent() -> None:
    """Without its front end the engine serves nobody: end at once, also in the middle of a step."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    print("plexor: the front end is gone, so the engine process ends", file=sys.stderr)
    os._exit(1)


class _Progress:
    """Tells the front end how far loading has come, not too often."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or done == total:
            self._told = now
            self._socket.send(encode(Loading(done, total)))


class _EngineLoop:
    """Steps while there is work, looking at the socket between steps; sleeps on the socket when there is none."""

    def __init__(self, core: EngineCore, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self._socket = socket
        self._stats: StepStats | None = None
        core.observe(self)

    def on_step(self, stats: StepStats) -> None:
        self._stats = stats

    def on_finish(self, output: Output) -> None:
        """Outputs travel with their step."""

    def run(self) -> None:
        """Until the front end says stop."""
        latest: StepStats | None = None
        while True:
            if not self._core.has_work:
                if latest is not None:
                    self._send(Outputs((), self._idle(latest)))
                    latest = None
                self._socket.poll()
            if not self._take_messages():
                return
            if self._core.has_work:
                self._stats = None
                outputs = tuple(self._core.step())
                latest = self._stats or latest
                if outputs or self._stats is not None:
                    self._send(Outputs(outputs, self._stats))

    def _take_messages(self) -> bool:
        """Do what has been asked so far; False after Stop."""
        while self._socket.poll(0):
            message: ToEngine = decode_to_engine(self._socket.recv())
            if isinstance(message, Stop):
                return False
            if isinstance(message, Submit):
                self._submit(message)
            else:
                self._finish(message)
        return True

    def _submit(self, message: Submit) -> None:
        added: list[str] = []
        try:
            for request in message.requests:
                self._core.add(from_wire(request))
                added.append(request.id)
        except RequestError as error:
            for request_id in added:
                self._core.finish(request_id, "abort")
            self._send(Refused(message.id, str(error), error.field))

    def _finish(self, message: Finish) -> None:
        self._core.finish(message.id, message.reason, message.stop_reason)

    def _idle(self, latest: StepStats) -> StepStats:
        """The figures after the last step, when nothing runs or waits."""
        return replace(
            latest,
            num_tokens=0,
            num_sampled=0,
            num_running=0,
            num_waiting=0,
            num_preempted=0,
            free_blocks=self._core.scheduler.pool.num_free,
            prefix_queries=0,
            prefix_hits=0,
            started=(),
        )

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))
