"""Parts of the server without a server: what travels, how bodies are read, pictures in URLs."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import fastapi
import httpx
import msgspec
import numpy
import pytest

from plexor.errors import RequestError
from plexor.runtime.request import Media, Output, Request, SamplingParams, TokenLogprobs
from plexor.runtime.stats import StepStats
from plexor.server.errors import ApiError, error_object
from plexor.server.http import Guard, ServerSettings, Serving, make_app
from plexor.server.intake import read_data_url
from plexor.server.metrics import Metrics
from plexor.server.protocol import ChatRequest, CompletionRequest, parse
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
    decode_from_engine,
    decode_to_engine,
    encode,
    from_wire,
    to_wire,
)

SAMPLING = SamplingParams(
    temperature=0.5, stop=("é", "\U0001f40d"), seed=-(2**63), logit_bias={5: -1.5, 300: 2}, stop_token_ids=(7,)
)
STATS = StepStats(
    num_tokens=1,
    num_sampled=2,
    num_running=3,
    num_waiting=4,
    num_preempted=5,
    free_blocks=6,
    total_blocks=12,
    prefix_queries=8,
    prefix_hits=9,
    started=("a",),
)


def test_a_request_survives_the_border() -> None:
    pixels = numpy.arange(24, dtype=numpy.float32).reshape(2, 3, 4)[:, ::2]
    media = Media("image", 1, 2, b"\x00\xff", pixels)
    request = Request("a.0", (1, 2, 3), SAMPLING, (0,), (media,), 12.5, b"salt")
    sent = decode_to_engine(encode(Submit("a", (to_wire(request),))))
    assert isinstance(sent, Submit)
    got = from_wire(sent.requests[0])
    assert (got.id, got.tokens, got.sampling, got.end_ids) == ("a.0", (1, 2, 3), SAMPLING, (0,))
    assert (got.arrived, got.cache_salt) == (12.5, b"salt")
    (medium,) = got.media
    assert (medium.kind, medium.start, medium.length, medium.digest) == ("image", 1, 2, b"\x00\xff")
    numpy.testing.assert_array_equal(medium.data, pixels)
    assert medium.data.dtype == pixels.dtype
    assert medium.data.flags.writeable


@pytest.mark.parametrize("message", [Submit("a", ()), Finish("a", "abort"), Finish("a", "stop", "."), Stop()])
def test_messages_to_the_engine_come_back_equal(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Loading(1, 2),
        Ready(max_length=10, vocab_size=20, num_blocks=3, block_size=4, max_sequences=5),
        Refused("a", "no", None),
        Outputs((Output(id="a.0", token_ids=(1,), logprobs=(TokenLogprobs(1, -0.5, 1, ((1, -0.5),)),)),), STATS),
        Outputs((Output(id="a.0", finish="stop", stop_reason=5), Output(id="b", stop_reason="x")), None),
        Failed("it broke"),
    ],
)
def test_messages_from_the_engine_come_back_equal(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message


@pytest.mark.parametrize(
    "data", [pickle.dumps(Stop), pickle.dumps({"type": "Stop"}), b"", b"\x81", encode(Loading(1, 2))]
)
def test_other_bytes_are_no_messages(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_to_engine(data)


def test_room_is_the_lesser_of_context_and_cache() -> None:
    assert Ready(max_length=10, vocab_size=1, num_blocks=3, block_size=4, max_sequences=1).room == 10
    assert Ready(max_length=99, vocab_size=1, num_blocks=3, block_size=4, max_sequences=1).room == 12


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m", "prompt": "p", **fields}).encode()


def test_the_request_goes_over_the_advice_over_the_defaults() -> None:
    advice = {"temperature": 0.6, "top_k": 20, "min_p": 0.1}
    sampling = parse(CompletionRequest, body(temperature=0, top_p=0.5)).sampling(advice, 7)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 20, 0.5, 0.1)
    assert sampling.max_tokens == 7
    plain = parse(CompletionRequest, body()).sampling({}, None)
    assert plain == SamplingParams()


def test_every_extra_reaches_its_parameter() -> None:
    request = parse(
        CompletionRequest,
        body(
            ignore_eos=True,
            min_tokens=2,
            stop="x",
            stop_token_ids=[3],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"5": 1},
            logprobs=4,
            n=3,
            seed=9,
        ),
    )
    assert request.sampling({}, 10) == SamplingParams(
        ignore_end=True,
        min_tokens=2,
        stop=("x",),
        stop_token_ids=(3,),
        include_stop=True,
        skip_special_tokens=False,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: 1},
        logprobs=4,
        n=3,
        seed=9,
        max_tokens=10,
    )


def test_the_newer_name_of_max_tokens_goes_before() -> None:
    messages = [{"role": "user", "content": "x"}]
    data = json.dumps({"model": "m", "messages": messages, "max_tokens": 5, "max_completion_tokens": 6}).encode()
    request = parse(ChatRequest, data)
    assert request.answer_limit == 6
    assert request.param_of("max_tokens") == "max_completion_tokens"


def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, b"[" + b"[]," * 2_000_001)
    assert caught.value.status == 413


def test_messages_are_cut_and_made_text() -> None:
    error = error_object(ApiError(400, "\ud800" + "x" * 5000))["error"]
    assert error["message"] is not None
    assert len(error["message"].encode()) < 1100


PIXEL = base64.b64encode(b"\x89PNG").decode()


@pytest.mark.parametrize("head", ["data:image/png;base64", "DATA:Image/PNG;BASE64", "data:image/png;name=a.png;base64"])
def test_a_data_url_is_read(head: str) -> None:
    assert read_data_url(f"{head},{PIXEL}") == b"\x89PNG"


@pytest.mark.parametrize(
    "url", ["http://[::1]/", "http://allowed\\@evil/x", "\tdata:image/png;base64,AAAA", "data:;base64,AAAA"]
)
def test_no_other_address_is_read(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_data_url(url)
    assert caught.value.field == "messages"
    assert "evil" not in str(caught.value)


def test_the_guard_closes_websockets_too() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the guard let it pass")

    async def send(message: Any) -> None:
        sent.append(message)

    receive: Callable[[], Awaitable[Any]] = asyncio.Event().wait
    scope = {"type": "websocket", "path": "/any", "headers": []}
    asyncio.run(Guard(app, api_keys=["k"])(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


class Routes:
    """A catalog in which one plugin brings routes, one of which is taken."""

    def add_routes(self, app: fastapi.FastAPI, engine: object, plugins: Iterable[str]) -> None:
        assert tuple(plugins) == ("stone",)

        @app.get("/stone")
        def stone() -> dict[str, bool]:
            return {"alive": engine.is_alive}  # type: ignore[attr-defined]

        @app.get("/version")
        def version() -> dict[str, str]:
            return {"version": "mine"}

        @app.get("/broken")
        def broken() -> None:
            raise ValueError("a secret of the server")


def ask(path: str, **headers: str) -> httpx.Response:
    """The answer of an application over an engine that has died."""
    client: Any = SimpleNamespace(is_alive=False)
    settings = ServerSettings(model_name="m", api_keys=("k",), enable_routes=("stone",))
    nothing: Any = None
    catalog: Any = Routes()
    app = make_app(Serving(client, nothing, nothing, Metrics("m"), settings), catalog)

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as asking:
            return await asking.get(path, headers=headers)

    return asyncio.run(get())


def test_a_dead_engine_is_not_healthy() -> None:
    assert ask("/health").status_code == 503


def test_routes_of_plugins_are_guarded_and_shadow_nothing() -> None:
    assert ask("/stone").status_code == 401
    assert ask("/stone", authorization="Bearer k").json() == {"alive": False}
    assert ask("/version", authorization="Bearer k").json()["version"] != "mine"


def test_an_error_of_the_server_says_nothing_of_its_insides() -> None:
    answer = ask("/broken", authorization="Bearer k")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_metrics_of_two_servers_do_not_meet() -> None:
    first, second = Metrics("m"), Metrics("m")
    first.on_step(STATS)
    assert b'plexor_num_requests_running{model_name="m"} 3.0' in first.render()
    assert b'plexor_kv_cache_usage_perc{model_name="m"} 0.5' in first.render()
    assert b'plexor_num_requests_running{model_name="m"} 0.0' in second.render()
