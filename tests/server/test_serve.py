"""The server as the unmodified `openai` client and as a careless one see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from plexor import Engine, EngineConfig, SamplingParams
from plexor.testing.server import RunningServer, eventually

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}
KEY = "first-key"
IGNORE_END = {"ignore_eos": True}
MESSAGES: list[Any] = [{"role": "user", "content": "how are you"}]


def test_a_completion_equals_the_engine_in_python(client: Any, tiny: Path) -> None:
    answer = client.completions.create(
        **GREEDY, prompt="once upon", extra_body={**IGNORE_END, "return_token_ids": True}
    )
    with Engine(str(tiny), config=EngineConfig(num_blocks=64)) as engine:
        expected = engine.generate("once upon", SamplingParams(temperature=0, max_tokens=24, ignore_end=True))[0]
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.model_extra["token_ids"] == expected.token_ids
    assert choice.model_extra["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.total_tokens == 24 + len(expected.prompt_token_ids)


def test_completion_pieces_joined_are_the_whole(client: Any) -> None:
    whole = client.completions.create(**GREEDY, prompt="stream me").choices[0]
    chunks = list(client.completions.create(**GREEDY, prompt="stream me", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_pieces_joined_are_the_whole(client: Any) -> None:
    whole = client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body=IGNORE_END)
    chunks = list(
        client.chat.completions.create(
            **GREEDY, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body=IGNORE_END
        )
    )
    *said, last, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert said[0].choices[0].delta.content == ""
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [*said, last])
    assert text == whole.choices[0].message.content
    assert usage.choices == []
    assert usage.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in [*said, last])


def test_a_stream_ends_with_done(server: RunningServer) -> None:
    body = {**GREEDY, "prompt": "a", "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"


def test_parts_of_a_message_are_lines(client: Any) -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined: list[Any] = [{"role": "user", "content": "a\nb"}]
    first, second = (client.chat.completions.create(**GREEDY, messages=messages) for messages in (parts, joined))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


def test_a_seed_repeats_and_n_answers_differ(client: Any) -> None:
    asked = {"model": "tiny", "temperature": 1.5, "max_tokens": 16, "n": 3, "seed": 7, "prompt": "draw"}
    first, again = (client.completions.create(**asked, extra_body=IGNORE_END) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 48
    pieces = ["", "", ""]
    for chunk in client.completions.create(**asked, extra_body=IGNORE_END, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == texts


def test_several_prompts_in_one_body(client: Any) -> None:
    prompts = ["one", "two", "three"]
    together = client.completions.create(**GREEDY, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    alone = [client.completions.create(**GREEDY, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    ids = client.completions.create(**GREEDY, prompt=[[40, 41], [42]])
    assert len(ids.choices) == 2
    assert ids.usage.prompt_tokens == 3


def test_echo_repeats_the_prompt(client: Any) -> None:
    plain = client.completions.create(**GREEDY, prompt="again").choices[0].text
    assert client.completions.create(**GREEDY, prompt="again", echo=True).choices[0].text == f"again{plain}"
    streamed = client.completions.create(**GREEDY, prompt="again", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == f"again{plain}"


def test_sixteen_tokens_are_the_default_and_a_chat_fills_the_context(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="a", extra_body=IGNORE_END)
    assert answer.usage.completion_tokens == 16
    nearly_full = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "é!" * 2720}], extra_body=IGNORE_END
    )
    assert nearly_full.usage.total_tokens == 8192
    assert nearly_full.choices[0].finish_reason == "length"


def test_logprobs_of_completions(client: Any) -> None:
    choice = client.completions.create(**GREEDY, prompt="log", logprobs=3, extra_body=IGNORE_END).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == max(top.values())  # greedy takes the likeliest
        assert top[token] == pytest.approx(logprob)
    chunks = client.completions.create(**GREEDY, prompt="log", logprobs=3, stream=True, extra_body=IGNORE_END)
    streamed = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    assert streamed == logprobs.tokens


def test_logprobs_of_chats(client: Any) -> None:
    choice = client.chat.completions.create(**GREEDY, messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0]
    for entry in choice.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    bare = client.chat.completions.create(**GREEDY, messages=MESSAGES, logprobs=True).choices[0].logprobs
    assert all(entry.top_logprobs == [] for entry in bare.content)


def test_a_stop_string_ends_the_answer(client: Any, server: RunningServer) -> None:
    whole = client.completions.create(**GREEDY, prompt="halt", extra_body=IGNORE_END).choices[0].text
    stop = whole[6:9]
    expected = whole[: whole.index(stop)]
    choice = client.completions.create(**GREEDY, prompt="halt", stop=[stop, "never"], extra_body=IGNORE_END).choices[0]
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    assert choice.model_extra["stop_reason"] == stop
    chunks = list(client.completions.create(**GREEDY, prompt="halt", stop=stop, stream=True, extra_body=IGNORE_END))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    kept = client.completions.create(
        **GREEDY, prompt="halt", stop=stop, extra_body={**IGNORE_END, "include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == expected + stop
    eventually(lambda: server.metric("plexor_num_requests_running") == 0)


def test_a_bias_chooses_the_token(client: Any) -> None:
    answer = client.completions.create(
        **GREEDY, prompt="a", logit_bias={"77": 100}, extra_body={**IGNORE_END, "return_token_ids": True}
    )
    assert answer.choices[0].model_extra["token_ids"] == [77] * 24
    ended = client.completions.create(
        **GREEDY, prompt="a", logit_bias={"77": 100}, extra_body={"stop_token_ids": [77], "min_tokens": 5}
    )
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens >= 6


def test_models_and_version(client: Any, server: RunningServer) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("../etc/passwd")
    assert caught.value.code == "model_not_found"
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/health").content == b""


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/version", "/metrics", "/nowhere", "/openapi.json"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY.upper()}"])
def test_every_path_wants_a_key(server: RunningServer, path: str, header: str | None) -> None:
    headers = {"Host": "localhost/health?x="} | ({} if header is None else {"Authorization": header})
    response = httpx.get(f"{server.url}{path}", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_keys_open_and_health_needs_none(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    second = {"Authorization": "Bearer second-key"}
    assert httpx.get(f"{server.url}/v1/models", headers=second).status_code == 200
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert httpx.post(f"{server.url}{path}", json={}).status_code == 401


PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def with_image(url: object) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {**CHAT, "messages": [{"role": "user", "content": [part]}]}


def each(name: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    """Bodies that differ from a good one in a field, and that field as the one at fault."""
    return [({name: value}, name) for value in values]


BAD_COMPLETIONS: list[Any] = [
    *each("temperature", float("nan"), float("inf"), "nan", "1", True, -3, []),
    *each("top_p", float("nan"), float("inf"), "nan", "1", True, 0, 1.1),
    *each("presence_penalty", float("nan"), float("-inf"), "nan", "1", True, -3, {}),
    *each("n", 0, -1, 10**9, True, "2", 1.5, 129, 13),
    *each("max_tokens", 0, -1, 10**18, 8192, "5", False),
    *each("seed", 2**63, 10**100, "x", 1.5),
    *each("top_k", -2, 0.5, "1", 2**40),
    *each("logprobs", 10**6, -1, "5", True, 21),
    *each("min_tokens", -1, 3, "0"),
    *each("logit_bias", {"999999999": 1}, {"301": 1}, {"-1": 1}, {"x": 1}, {"": 1}, []),
    *each("logit_bias", {"5": float("nan")}, {"5": 101}, {"5": "1"}),
    *each("stop", "", [""], ["a"] * 5, ["a"] * 1000, "x" * 10**5, 5, ["a", 1], {}),
    *each("stop_token_ids", [-1], [301], ["1"], 5, [True]),
    *each("prompt", "", [], [[]], [""], [-1], [301], [2**63], [1, "a"], ["a", 1], [["a"]], [[1], "a"], [True], None, 5,
        {}, "x" * 900_000, [[1]] * 1025, [5] * 8192, "half \ud800", {"a": 1}),
    *[({name: "x"}, name) for name in ("repetition_penalty", "frequency_penalty", "min_p", "stream", "ignore_eos",
                                       "skip_special_tokens", "stream_options", "echo", "return_token_ids")],
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"user": "\udc80"}, "user"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
]  # fmt: skip
BAD_CHATS: list[Any] = [
    *each("messages", [], "x", 42, None, [[]], ["x"], [{}], [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": []}],
        [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x" * 900_000}],
        [{"role": "user", "content": "é" * 8191}], [{"role": "user", "content": "\ud800"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]),
    *[(with_image(url), "messages") for url in (
        "file:///etc/passwd", "http://127.0.0.1/x.png", "https://example.com/x.png", "ftp://x", "//x", "", 5, "data:",
        "data:image/png", "data:image/png;base64", "data:image/png,AAAA", "data:text/html;base64,AAAA",
        "data:image/png;base64,A", "data:image/png;base64,AA AA", "data:image/png;base64,%%%%",
        "data:image/png;base64,AAAA")],
    *each("tools", [], [{"type": "function"}], {"a": 1}, "x"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": []}, "functions"),
    ({"top_logprobs": 5}, "top_logprobs"),
    *[({"logprobs": True, "top_logprobs": value}, "top_logprobs") for value in (10**6, -1, "5")],
    ({"logprobs": 1}, "logprobs"),
    ({"max_completion_tokens": 9000}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
]  # fmt: skip


def bodies(base: dict[str, Any], table: list[tuple[dict[str, Any], str]]) -> list[Any]:
    return [pytest.param({**base, **changes}, param, id=f"{param}-{i}") for i, (changes, param) in enumerate(table)]


def check_refusal(server: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    for streams in (False, True):
        content = json.dumps(body if "stream" in body or not streams else {**body, "stream": True})
        response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}
        assert len(response.content) < 2000


@pytest.mark.parametrize(("body", "param"), bodies(PROMPT, BAD_COMPLETIONS))
def test_a_bad_completion_is_refused_by_name(server: RunningServer, body: dict[str, Any], param: str) -> None:
    check_refusal(server, "/v1/completions", body, param)


@pytest.mark.parametrize(("body", "param"), bodies(CHAT, BAD_CHATS))
def test_a_bad_chat_is_refused_by_name(server: RunningServer, body: dict[str, Any], param: str) -> None:
    check_refusal(server, "/v1/chat/completions", body, param)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"42", 400),
        (b"null", 400),
        (b'"x"', 400),
        (b"\xff\xfe{}", 400),
        (b'{"model": "tiny", "prompt": "\xff"}', 400),
        (b'{"a":' * 100_000, 400),
        (b"[" * 100_000, 400),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400),
        (b" " * (1024 * 1024 + 1), 413),
    ],
    ids=range(14),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_no_request_is_refused(server: RunningServer, path: str, content: bytes, status: int) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_the_prompt_too_long_is_refused_with_both_numbers(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"9000 tokens.*8192"):
        client.completions.create(**GREEDY, prompt=[5] * 9000)
    with pytest.raises(openai.BadRequestError, match=r"100 tokens.*8200.*8300.*8192"):
        client.completions.create(model="tiny", prompt=[5] * 100, max_tokens=8200, stream=True)


def test_other_refusals(server: RunningServer) -> None:
    http = server.http
    good = json.dumps(PROMPT)
    assert http.post("/v1/completions", content=good).status_code == 415
    assert http.post("/v1/completions", content=good, headers={"Content-Type": "text/plain"}).status_code == 415
    zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert http.post("/v1/completions", content=good, headers=zipped).status_code == 415
    for model in ("../../etc", "", "Tiny", "x" * 10**5):
        response = http.post("/v1/completions", json={**PROMPT, "model": model})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert len(response.content) < 2000
    assert http.get("/v1/nowhere").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/health", headers={f"x-{i}": "y" for i in range(200)}).status_code == 431

    def tiny_chunks() -> Any:
        yield from (b" " * 512 for _ in range(3000))

    endless = http.post("/v1/completions", content=tiny_chunks(), headers={"Content-Type": "application/json"})
    assert endless.status_code == 413


def test_unknown_fields_and_nulls_change_nothing(server: RunningServer) -> None:
    plain = {**PROMPT, "temperature": 0}
    odd = {**plain, "unheard_of": {"a": [1]}, "user": "me", "n": None, "stop": None, "tools": None, "logit_bias": None}
    texts = [server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in (plain, odd)]
    assert texts[0] == texts[1]
    sets = {"Content-Type": "application/json; charset=utf-8"}
    assert server.http.post("/v1/completions", content=json.dumps(plain), headers=sets).status_code == 200
    odd_text = {**plain, "prompt": "nul \x00 and \u202e bidi"}
    assert server.http.post("/v1/completions", json=odd_text).status_code == 200


def test_a_full_line_is_turned_away(server: RunningServer) -> None:
    long = {"model": "tiny", "prompt": "a", "max_tokens": 8000, "n": 12, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=long) as response:
        assert response.status_code == 200
        refused = server.http.post("/v1/completions", json=PROMPT)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert server.metric("plexor_admission_rejections_total") >= 1
    eventually(lambda: server.http.post("/v1/completions", json=PROMPT).status_code == 200)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 9])
def test_a_client_that_leaves_ends_its_requests(server: RunningServer, stream: bool, n: int) -> None:
    """With n = 9 some of the answers are still waiting."""
    eventually(lambda: server.metric("plexor_num_requests_running") == 0)
    aborted = server.metric('plexor_request_success_total{finished_reason="abort",model_name="tiny"}')
    body = {"model": "tiny", "prompt": "a", "max_tokens": 8000, "n": n, "stream": stream, "ignore_eos": True}
    with server.new_client() as http:
        request = http.build_request("POST", "/v1/completions", json=body)
        if stream:
            response = http.send(request, stream=True)
            assert next(response.iter_lines())
            response.close()
        else:
            request.extensions["timeout"] = {"connect": 60, "read": 0.5, "write": 60, "pool": 60}
            with pytest.raises(httpx.ReadTimeout):
                http.send(request)
    for gauge in ("requests_running", "requests_waiting"):
        eventually(lambda gauge=gauge: server.metric(f"plexor_num_{gauge}") == 0)  # type: ignore[misc]
    eventually(lambda: server.metric("plexor_kv_cache_usage_perc") == 0)
    lines = server.http.get("/metrics").text.splitlines()
    total = sum(float(line.split()[-1]) for line in lines if 'finished_reason="abort"' in line and "_total" in line)
    assert total >= aborted + n


def test_metrics_have_the_names_that_dashboards_know(server: RunningServer, client: Any) -> None:
    before = server.metric("plexor_generation_tokens_total")
    prefix = "cache me, please: " * 8
    for _ in range(2):
        client.completions.create(model="tiny", prompt=prefix, max_tokens=5, extra_body=IGNORE_END)
    text = server.http.get("/metrics").text
    assert server.metric("plexor_generation_tokens_total") == before + 10
    assert server.metric("plexor_prefix_cache_hits_total") >= 100
    for name in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
    ):
        assert f'plexor_{name}{{model_name="tiny"' in text or f"plexor_{name}{{" in text, name
    assert server.metric("plexor_request_queue_time_seconds_count") > 0
    assert server.http.head("/metrics").status_code == 200
