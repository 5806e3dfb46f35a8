"""Impossible sampling values are refused when they are made, each with the field's name, the value and the range."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from plexor.errors import RequestError
from plexor.runtime.request import Output, SamplingParams, TokenLogprobs

REFUSED: dict[str, list[Any]] = {
    "temperature": [math.nan, math.inf, -0.1, 2.1, True, "1", None, 10**400],
    "top_k": [-2, 1.0, True, None, 2**31],
    "top_p": [0, 0.0, -0.5, 1.01, math.nan, False],
    "min_p": [-0.01, 1.01, math.nan, math.inf],
    "repetition_penalty": [0.0, -1.0, math.nan, math.inf, 1e9],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "max_tokens": [0, -1, 1.5, True],
    "min_tokens": [-1, 0.0, None],
    "seed": [2**63, -(2**63) - 1, 1.0, True, 10**5000],
    "logprobs": [-1, 21, True],
    "n": [0, 129, 1.0, True],
    "include_stop": [1, None, "yes"],
    "ignore_end": [0],
    "skip_special_tokens": [0],
    "stop": ["", ["a", ""], [1], 5, None, ["a", "b", "c", "d", "e"]],
    "stop_token_ids": [[-1], ["a"], [True], 5],
    "logit_bias": [[], {-1: 0.0}, {"1": 0.0}, {1: math.nan}, {1: 101}, {1: None}],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_out_of_range_is_refused_by_name(field: str) -> None:
    for value in REFUSED[field]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{field: value})
        assert caught.value.field == field
        assert field in str(caught.value)
        assert len(str(caught.value)) < 200


def test_the_message_gives_the_value_and_the_range() -> None:
    with pytest.raises(RequestError, match=r"^top_p is 1\.5, but must be a number above 0 and at most 1$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(RequestError, match=r"^min_tokens is 5, but must be a whole number from 0 to 3 \(max_tokens\)$"):
        SamplingParams(min_tokens=5, max_tokens=3)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, seed=-(2**63), logprobs=0, n=128, max_tokens=1)
    SamplingParams(temperature=2.0, presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100.0}, logprobs=20)


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_token_ids_past_the_vocabulary_are_refused() -> None:
    SamplingParams(stop_token_ids=(9,), logit_bias={9: 1.0}).check_vocabulary(10)
    for field, sampling in (
        ("stop_token_ids", SamplingParams(stop_token_ids=(3, 10))),
        ("logit_bias", SamplingParams(logit_bias={10: 1.0})),
    ):
        with pytest.raises(RequestError, match="token 10, but the vocabulary has 10 tokens") as caught:
            sampling.check_vocabulary(10)
        assert caught.value.field == field


def test_what_crosses_processes_comes_back_equal() -> None:
    sampling = SamplingParams(
        temperature=0, stop=("é",), stop_token_ids=(1,), logit_bias={7: -1.5}, seed=-3, logprobs=2
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams) == sampling
    logprobs = (TokenLogprobs(4, -0.5, 2, ((3, -0.25), (4, -0.5))),)
    for stop_reason in (None, 4, "###"):
        output = Output(id="a", token_ids=(4,), logprobs=logprobs, finish="stop", stop_reason=stop_reason)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=Output) == output


def test_a_bad_value_from_another_process_is_refused_too() -> None:
    with pytest.raises(RequestError, match="temperature is 5"):
        msgspec.json.decode(b'{"temperature": 5.0}', type=SamplingParams)
