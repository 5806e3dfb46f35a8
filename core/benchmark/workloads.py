"""The workloads by their names: how many requests, how long, and what counts.

decode_bsN        N requests at once, 128 in, 256 out: time per token
prefill_Nk        one request, N * 1024 in, 1 out: time to first token
serve_IN_OUT      512 requests queued at once: tokens per second
start             128 in, 1 out, timed from the start of the process
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from plexor.errors import ConfigError
from plexor.extension.host import suggest

Kind = Literal["start", "decode", "prefill", "serve"]

DEFAULT = "start,decode_bs1,decode_bs8"
DECODE_PROMPT, DECODE_TOKENS = 128, 256
SERVE_REQUESTS = 512
EXAMPLES = ("start", "decode_bs1", "decode_bs8", "decode_bs64", "prefill_8k", "serve_1024_128", "serve_128_1024")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are queued at once, each of random prompt tokens and a fixed number of greedy tokens."""

    name: str
    kind: Kind
    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def length(self) -> int:
        """Tokens of one request, prompt and answer together."""
        return self.prompt_tokens + self.new_tokens


def parse_workloads(text: str) -> tuple[Workload, ...]:
    """Names with commas between, in that order but `start` first; ConfigError for one that is not known or empty.

    A start is over once anything else has run.
    """
    names = dict.fromkeys(name.strip() for name in text.split(","))
    return tuple(sorted((_parse(name) for name in names), key=lambda workload: workload.kind != "start"))


def _parse(name: str) -> Workload:
    for pattern, make in _FORMS.items():
        found = re.fullmatch(pattern, name)
        if found is not None:
            return make(name, *(int(number) for number in found.groups()))
    raise ConfigError(f"there is no workload {name!r}: {suggest(name, EXAMPLES, '')}")


def _start(name: str) -> Workload:
    return Workload(name, "start", 1, DECODE_PROMPT, 1)


def _decode(name: str, requests: int) -> Workload:
    return Workload(name, "decode", requests, DECODE_PROMPT, DECODE_TOKENS)


def _prefill(name: str, thousands: int) -> Workload:
    return Workload(name, "prefill", 1, thousands * 1024, 1)


def _serve(name: str, prompt_tokens: int, new_tokens: int) -> Workload:
    return Workload(name, "serve", SERVE_REQUESTS, prompt_tokens, new_tokens)


_FORMS: Mapping[str, Callable[..., Workload]] = MappingProxyType(
    {
        r"start": _start,
        r"decode_bs([1-9]\d{0,5})": _decode,
        r"prefill_([1-9]\d{0,5})k": _prefill,
        r"serve_([1-9]\d{0,6})_([1-9]\d{0,6})": _serve,
    }
)
