"""A real `plexor serve` for tests, with clients for it and a look at its processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
import openai

PATIENCE = 120.0
"""Seconds that anything may take on a slow machine."""


@dataclass
class RunningServer:
    """A server process and what it has said on standard error."""

    process: subprocess.Popen[str]
    key: str | None = None
    url: str = ""
    log: list[str] = field(default_factory=list)

    @cached_property
    def http(self) -> httpx.Client:
        """A client with the key."""
        return self.new_client()

    def new_client(self) -> httpx.Client:
        """A client with the key and connections of its own, to be closed."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)

    @property
    def openai(self) -> openai.OpenAI:
        """The official client as it comes."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def descendants(self) -> list[int]:
        """Process ids of everything that the server has started."""
        found: list[int] = []
        pending = [self.process.pid]
        while pending:
            pid = pending.pop()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pending += map(int, children)
            found += map(int, children)
        return found

    def engine_pid(self) -> int:
        """The engine process: the one that multiprocessing has spawned."""
        (pid,) = (pid for pid in self.descendants() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return pid

    def end(self) -> int:
        """Ask it to end, by force if need be; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


def eventually(what: Callable[[], bool]) -> None:
    """Wait until it is so, for as long as a slow machine may need."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_server(model: str, *options: str, plugins: str, key: str | None = None) -> RunningServer:
    """A server on a free port of the loopback device and on one CPU core, ready for requests.

    options: of `plexor serve`. plugins: to load, as in PLEXOR_PLUGINS. key: which of its keys to use.
    """
    settings = ("OMP_NUM_THREADS=1", f"PLEXOR_PLUGINS={plugins}")
    serve = ("-m", "plexor", "serve", "--model", model, "--port", "0", "--device", "cpu")
    command = ["env", *settings, sys.executable, *serve, *options]
    server = RunningServer(subprocess.Popen(command, stderr=subprocess.PIPE, text=True), key)
    ready = threading.Event()

    def follow() -> None:
        assert server.process.stderr is not None
        for line in server.process.stderr:
            server.log.append(line)
            if line.startswith("ready on "):
                server.url = line.split()[2]
                ready.set()
        ready.set()

    threading.Thread(target=follow, daemon=True).start()
    assert ready.wait(PATIENCE)
    assert server.url, "".join(server.log)
    return server
