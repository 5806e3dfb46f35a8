"""How a server starts, ends, and what it does when its engine dies."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from plexor.testing.server import PATIENCE, RunningServer, eventually, is_running, start_server

Start = Callable[..., RunningServer]
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a",
    "max_tokens": 8000,
    "temperature": 0,
    "stream": True,
    "ignore_eos": True,
}


@pytest.fixture
def start(tiny: Path) -> Iterator[Start]:
    """Starts servers and sees to it that none is left."""
    servers: list[RunningServer] = []

    def start(*options: str) -> RunningServer:
        servers.append(start_server(str(tiny), "--num-blocks", "600", *options, plugins="llama"))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()


def events(lines: Iterator[str]) -> list[Any]:
    """The chunks of a stream; it must end with [DONE]."""
    *chunks, done = (line for line in lines if line)
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_a_signal_lets_what_runs_end_and_leaves_no_process(start: Start) -> None:
    server = start("--shutdown-timeout", "100")
    body = {**LONG, "max_tokens": 1500}
    whole = server.http.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]
    children = server.descendants()
    assert children
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: not accepts(server))
        chunks = [first, *events(lines)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(PATIENCE) == 0
    eventually(lambda: not any(is_running(pid) for pid in children))


def test_what_outlives_the_timeout_is_aborted(start: Start) -> None:
    server = start("--shutdown-timeout", "0")
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        assert events(lines)[-1]["choices"][0]["finish_reason"] == "abort"
    assert server.process.wait(PATIENCE) == 0


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    server = start("--shutdown-timeout", "1000")
    children = server.descendants()
    with server.http.stream("POST", "/v1/completions", json={**LONG, "n": 4}) as response:
        next(response.iter_lines())
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: not accepts(server))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) != 0
    eventually(lambda: not any(is_running(pid) for pid in children))


def test_a_killed_engine_ends_the_server(start: Start) -> None:
    server = start()
    with server.new_client() as probe, server.http.stream("POST", "/v1/completions", json=LONG) as response:
        assert probe.get("/health").status_code == 200
        lines = response.iter_lines()
        next(lines)
        subprocess.run(["kill", "-KILL", str(server.engine_pid())], check=True)
        error = events(lines)[-1]["error"]
        assert error["type"] == "server_error"
        assert "signal" not in error["message"]
        assert health_of(probe) in (503, None)
    assert server.process.wait(PATIENCE) == 1
    assert any("killed by signal 9" in line for line in server.log)
    assert not any("Traceback" in line for line in server.log)


def test_an_engine_does_not_outlive_its_front_end(start: Start) -> None:
    server = start()
    children = server.descendants()
    server.process.kill()
    server.process.wait(PATIENCE)
    eventually(lambda: not any(is_running(pid) for pid in children))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
        (["--max-length", "9000"], "max_length is 9000, but the model has 8192 positions"),
        (["--enable-routes", "nobody"], "--enable-routes names 'nobody', which brings no routes"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--port", "99999"], "99999 must lie between 0 and 65535"),
        (["--api-key", ""], "--api-key is empty"),
        (["--shutdown-timeout", "nan"], "must be a number of seconds"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_start_says_so_in_one_line(tiny: Path, options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "plexor", "serve", "--model", str(tiny), "--port", "0", "--device", "cpu"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def accepts(server: RunningServer) -> bool:
    """Whether the port takes connections."""
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def health_of(probe: httpx.Client) -> int | None:
    """The status of /health, None once the server is gone."""
    try:
        return probe.get("/health").status_code
    except httpx.TransportError:
        return None
