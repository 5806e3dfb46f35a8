"""Whatever the arrivals, aborts, preemptions and shared prefixes: every request gets the tokens it would get alone.

The stand-in for a device reads and writes a cache as a model does, from nothing but the packed steps: an entry is the
whole text up to its token, so a block that is shared wrongly, or overwritten, or read before it was written shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexor.errors import ConfigError, PluginError, RequestError
from plexor.runtime.packer import NewSequence, StepInput, pack
from plexor.runtime.request import FinishReason, Media, Output, Request, SamplingParams, TokenLogprobs
from plexor.runtime.scheduler import Plan, Scheduler, SchedulerConfig

VOCABULARY = 4
END, STOP = 3, 2
Item = tuple[int, bytes, int]  # a token, and the medium and the place in it whose embedding replaces the token's
Text = tuple[Item, ...]


def draw(text: Text, seed: int, step: int) -> int:
    """The stand-in for a model and its sampler: a token that depends on all of the text, the seed and the step."""
    return blake2b(repr((text, seed, step)).encode(), digest_size=2).digest()[0] % VOCABULARY


@dataclass
class State:
    """What the device knows of the sequence in a slot: as plexor.runtime.state.SlotState."""

    new: NewSequence
    blocks: list[int] = field(default_factory=list)
    token: int | None = None
    length: int = 0
    num_drawn: int = 0


@dataclass
class Device:
    """Runs packed steps in the order of their launch, from what they bring and what it kept of earlier ones."""

    block_size: int
    cache: dict[int, Text] = field(default_factory=dict)
    slots: dict[int, State] = field(default_factory=dict)

    def run(self, step: StepInput) -> list[int]:
        """The drawn tokens. A text is what the cache held before the step, then the step's own tokens."""
        for new in step.new:
            self.slots[new.slot] = State(new, num_drawn=len(new.generated_ids))
        for part in step.blocks:
            state = self.slots[part.slot]
            assert len(state.blocks) == part.first, "a block is missing, or sent twice"
            state.blocks += part.blocks
        rows = [(slot, self._decode(self.slots[slot]), True) for slot in step.decodes]
        rows += [(piece.slot, self._piece(step, index), piece.draws >= 0) for index, piece in enumerate(step.pieces)]
        counts = [1] * len(step.decodes) + [len(piece.token_ids) for piece in step.pieces]
        for (slot, text, _), count in zip(rows, counts, strict=True):
            for position in range(len(text) - count, len(text)):
                self.cache[self._place(self.slots[slot], position)] = text[: position + 1]
        for slot, text, _ in rows:
            assert self._read(self.slots[slot], len(text)) == text, "a token of this step was overwritten"
        return [self._draw(self.slots[slot], text) for slot, text, draws in rows if draws]

    def _decode(self, state: State) -> Text:
        assert state.token is not None, "a decode of a sequence that nothing was drawn for"
        return (*self._read(state, state.length), (state.token, b"", 0))

    def _piece(self, step: StepInput, index: int) -> Text:
        piece, first_row = step.pieces[index], len(step.decodes) + sum(len(p.token_ids) for p in step.pieces[:index])
        state, items = self.slots[piece.slot], [(token_id, b"", 0) for token_id in piece.token_ids]
        for span in step.media:
            if span.slot == piece.slot:
                (medium,) = [medium for medium in state.new.media if medium.index == span.index]
                for offset in range(span.count):
                    row = span.row - first_row + offset
                    items[row] = (items[row][0], medium.digest, span.first + offset)
        assert piece.draws in (-1, state.num_drawn)
        return self._read(state, piece.start) + tuple(items)

    def _read(self, state: State, length: int) -> Text:
        entries = [self.cache[self._place(state, position)] for position in range(length)]
        assert all(entry == entries[-1][: position + 1] for position, entry in enumerate(entries)), "a stale entry"
        return entries[-1] if entries else ()

    def _place(self, state: State, position: int) -> int:
        return state.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _draw(self, state: State, text: Text) -> int:
        prompt = state.new.prompt_ids
        assert len(text) == len(prompt) + state.num_drawn
        assert [item[0] for item in text[: len(prompt)]] == prompt
        state.token, state.length = draw(text, state.new.seed, state.num_drawn), len(text)
        state.num_drawn += 1
        return state.token


def text_of(request: Request) -> Text:
    items = [(token_id, b"", 0) for token_id in request.tokens]
    for medium in request.media:
        for offset in range(medium.length):
            items[medium.start + offset] = (items[medium.start + offset][0], medium.digest, offset)
    return tuple(items)


def alone(request: Request, context: int) -> tuple[list[int], str]:
    """The tokens and the finish of a request that has the device to itself."""
    text, sampling = text_of(request), request.sampling
    tokens: list[int] = []
    limit = sampling.max_tokens or context - len(request.tokens)
    assert sampling.seed is not None
    while True:
        tokens.append(draw(text, sampling.seed, len(tokens)))
        text = (*text, (tokens[-1], b"", 0))
        ends = (tokens[-1] in request.end_ids and not sampling.ignore_end) or tokens[-1] in sampling.stop_token_ids
        if ends and len(tokens) > sampling.min_tokens:
            return tokens, "stop"
        if len(tokens) == limit:
            return tokens, "length"


@dataclass
class Run:
    """A scheduler, a device and everything that came out."""

    config: SchedulerConfig
    scheduler: Scheduler = field(init=False)
    device: Device = field(init=False)
    launched: deque[tuple[Plan, list[int]]] = field(default_factory=deque)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.device = Device(self.config.block_size)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.outputs[request.id] = []

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert all(earlier.finish is None for earlier in self.outputs[output.id]), "an output after the last"
            self.outputs[output.id].append(output)

    def step(self, *, ahead: bool) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.launched or not self.scheduler.has_work, "there is work, but nothing is computed"
        else:
            assert 0 < plan.num_tokens <= self.config.max_step_tokens
            sequences = [*plan.decodes, *(piece.sequence for piece in plan.pieces)]
            assert len(set(sequences)) == len(sequences) <= self.config.max_sequences
            packed = pack(plan)
            packed = msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=StepInput)
            self.launched.append((plan, self.device.run(packed)))
            self.plans.append(plan)
        self.scheduler.check()
        while self.launched and (plan is None or len(self.launched) > (1 if ahead else 0)):
            self.commit()

    def commit(self) -> None:
        plan, sampled = self.launched.popleft()
        self.take(self.scheduler.commit(plan, sampled))
        self.scheduler.check()

    def finish(self, *, ahead: bool = True, bound: int = 10_000) -> None:
        for _ in range(bound):
            if not self.scheduler.has_work:
                return
            self.step(ahead=ahead)
        raise AssertionError(f"requests are unfinished after {bound} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for output in self.outputs[request_id] for token_id in output.token_ids]


def make_config(**changes: int | bool | None) -> SchedulerConfig:
    sizes = {"block_size": 4, "num_blocks": 32, "max_sequences": 4, "max_step_tokens": 16, "max_length": 64}
    return SchedulerConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def make_request(request_id: str, tokens: Sequence[int], max_tokens: int | None = 4, **fields: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, **fields)  # type: ignore[arg-type]
    return Request(request_id, tuple(tokens), sampling, end_ids=())


REASONS: tuple[FinishReason, ...] = ("abort", "stop")

PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=24),
    st.integers(1, 24).map(lambda length: [0] * length),
)


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> Request:
    tokens = draw(PROMPTS)
    media, start = [], 0
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        start += draw(st.integers(0, 6))
        length = draw(st.integers(1, 7))
        if start + length <= len(tokens):
            digest = draw(st.sampled_from([b"cat", b"dog"]))
            media.append(Media("image", start, length, digest, numpy.zeros(2)))
            start += length
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 16)))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens or 4, 4))),
        stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
        ignore_end=draw(st.booleans()),
        seed=draw(st.integers(0, 1)),
    )
    salt = draw(st.sampled_from([b"", b"", b"other"]))
    return Request(request_id, tuple(tokens), sampling, end_ids=(END,), media=tuple(media), cache_salt=salt)


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    max_sequences = draw(st.integers(1, 5))
    return SchedulerConfig(
        block_size=draw(st.integers(1, 5)),
        num_blocks=draw(st.integers(6, 24)),
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + draw(st.integers(0, 20)),
        max_length=draw(st.integers(16, 48)),
        prefix_caching=draw(st.booleans()),
        chunk=draw(st.sampled_from([None, 1, 7])),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), config=configs())
def test_every_request_gets_the_tokens_it_would_get_alone(data: st.DataObject, config: SchedulerConfig) -> None:
    run, context, given_up = Run(config), min(config.max_length, config.capacity), {}
    accepted: list[Request] = []
    for number in range(data.draw(st.integers(1, 7), label="requests")):
        request = data.draw(requests(str(number)))
        num_needed = len(request.tokens) + (request.sampling.max_tokens or 1)
        if num_needed > context:
            with pytest.raises(RequestError, match=str(len(request.tokens))):
                run.add(request)
        else:
            run.add(request)
            accepted.append(request)
        for _ in range(data.draw(st.sampled_from([0, 0, 1, 3, 9]), label="steps")):
            run.step(ahead=data.draw(st.booleans(), label="ahead"))
        if accepted and data.draw(st.sampled_from([False, False, True]), label="give up"):
            victim, reason = data.draw(st.sampled_from(accepted)).id, data.draw(st.sampled_from(REASONS))
            output = run.scheduler.finish(victim, reason)
            assert (output is None) == any(earlier.finish for earlier in run.outputs[victim])
            if output is not None:
                run.take([output])
                given_up[victim] = reason
    ahead = data.draw(st.booleans(), label="ahead")
    run.finish(ahead=ahead, bound=40 * sum(len(request.tokens) + context for request in accepted) + 40)
    for request in accepted:
        finishes = [output.finish for output in run.outputs[request.id]]
        assert all(finish is None for finish in finishes[:-1])
        tokens, finish = alone(request, context)
        if request.id in given_up:
            assert finishes[-1] == given_up[request.id]
            assert run.tokens(request.id) == tokens[: len(run.tokens(request.id))]
        else:
            assert (run.tokens(request.id), finishes[-1]) == (tokens, finish)
    run.scheduler.pool.check([])
    assert run.scheduler.pool.num_free == config.num_blocks


def test_decodes_never_wait_behind_a_prompt() -> None:
    run = Run(make_config(max_step_tokens=6))
    run.add(make_request("short", [0, 1], max_tokens=12))
    run.step(ahead=False)
    run.add(make_request("long", [1] * 40))
    for _ in range(6):
        run.step(ahead=False)
        assert [sequence.request.id for sequence in run.plans[-1].decodes] == ["short"]
        assert [(piece.sequence.request.id, piece.length) for piece in run.plans[-1].pieces] == [("long", 5)]


def test_a_prompt_is_cut_into_chunks() -> None:
    run = Run(make_config(chunk=7))
    run.add(make_request("a", range(17), max_tokens=1))
    run.finish()
    pieces = [(piece.start, piece.length, piece.samples) for plan in run.plans for piece in plan.pieces]
    assert pieces == [(0, 7, False), (7, 7, False), (14, 3, True)]


def test_running_ahead_draws_no_token_too_many() -> None:
    run = Run(make_config())
    run.add(make_request("a", [0, 1, 0], max_tokens=5))
    run.add(make_request("b", [1] * 60, max_tokens=None))
    run.finish(ahead=True)
    rows = [sequence.request.id for plan in run.plans for sequence in plan.rows]
    assert (rows.count("a"), rows.count("b")) == (5, 4)
    assert [run.outputs[name][-1].finish for name in "ab"] == ["length", "length"]


def test_the_row_of_a_sequence_that_has_ended_is_dropped() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(Request("a", (0, 1), SamplingParams(max_tokens=9), end_ids=(END,)))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None
    assert second is not None
    (output,) = scheduler.commit(first, [END])
    assert (output.token_ids, output.finish, output.stop_reason) == ((END,), "stop", None)
    assert scheduler.pool.num_free == 32
    assert scheduler.has_work
    assert scheduler.commit(second, [0]) == []
    assert not scheduler.has_work


def test_a_stop_id_is_the_reason() -> None:
    scheduler = Scheduler(make_config())
    sampling = SamplingParams(stop_token_ids=(STOP,), min_tokens=1)
    scheduler.add(Request("a", (0, 1), sampling, end_ids=(END,)))
    outputs = []
    for token_id in (END, STOP):
        plan = scheduler.schedule()
        assert plan is not None
        outputs += scheduler.commit(plan, [token_id], [TokenLogprobs(token_id, -0.5, 1)])
    assert [output.finish for output in outputs] == [None, "stop"]
    assert outputs[-1].stop_reason == STOP
    assert outputs[-1].logprobs == (TokenLogprobs(STOP, -0.5, 1),)


def test_the_youngest_gives_way_and_comes_back() -> None:
    run = Run(make_config(block_size=2, num_blocks=12, max_sequences=3, max_step_tokens=24, prefix_caching=False))
    for name in "abc":
        run.add(make_request(name, [ord(name) % 2, 1, 0], max_tokens=10))
    run.finish()
    preempted = [name for plan in run.plans for name in plan.preempted]
    assert preempted[0] == "c"
    assert "a" not in preempted
    assert all(len(run.tokens(name)) == 10 for name in "abc")


def test_a_sequence_that_gave_way_waits_for_its_token_in_flight() -> None:
    scheduler = Scheduler(make_config(block_size=2, num_blocks=5, prefix_caching=False))
    scheduler.add(make_request("a", range(4), max_tokens=2))
    scheduler.add(make_request("b", range(3), max_tokens=6))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.commit(first, [0, 0])
    assert scheduler.schedule() is None  # a's last token is in flight, and b has just lost its blocks
    assert scheduler.abort("a") is not None
    assert scheduler.schedule() is None
    (output,) = scheduler.commit(second, [0, 1])
    assert (output.id, output.token_ids) == ("b", (1,))
    resumed = scheduler.schedule()
    assert resumed is not None
    assert [(piece.start, piece.length, piece.samples) for piece in resumed.pieces] == [(0, 5, True)]
    assert pack(resumed).new[0].generated_ids == [0, 1]


def test_a_shared_prompt_is_computed_once_even_in_one_step() -> None:
    run = Run(make_config(max_step_tokens=64))
    for name in "abc":
        run.add(make_request(name, range(18), max_tokens=2))
    run.finish()
    prompt_tokens = sum(piece.length for plan in run.plans for piece in plan.pieces)
    assert prompt_tokens == 18 + 2 + 2
    assert [run.outputs[name][-1].num_cached_tokens for name in "abc"] == [0, 16, 16]
    assert sum(plan.prefix_hits for plan in run.plans) == 32


def test_a_prompt_known_in_full_computes_its_last_token() -> None:
    run = Run(make_config())
    for name in "ab":
        run.add(make_request(name, range(8), max_tokens=1))
        run.finish()
    assert [(piece.start, piece.length) for piece in run.plans[-1].pieces] == [(4, 4)]


def test_salts_and_other_pictures_share_nothing() -> None:
    run = Run(make_config())
    for name, salt, digest in (("a", b"", b"cat"), ("b", b"x", b"cat"), ("c", b"", b"dog"), ("d", b"", b"cat")):
        media = (Media("image", 1, 6, digest, numpy.ones((2, 3), dtype=numpy.float32)),)
        run.add(Request(name, tuple(range(10)), SamplingParams(max_tokens=1), (), media, cache_salt=salt))
        run.finish()
    assert [run.outputs[name][-1].num_cached_tokens for name in "abcd"] == [0, 0, 0, 8]


def test_one_picture_at_two_places_shares_nothing() -> None:
    run = Run(make_config())
    for name, start, length in (("a", 1, 2), ("b", 2, 2), ("c", 1, 1)):
        media = (Media("image", start, length, b"cat", numpy.zeros(1)),)
        run.add(Request(name, (0,) * 10, SamplingParams(max_tokens=1), (), media))
        run.finish()
    assert [run.outputs[name][-1].num_cached_tokens for name in "abc"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "sizes", "numbers"),
    [
        ([], 1, {}, ["empty"]),
        ([0] * 64, None, {}, ["64 tokens", "context holds 64", "63"]),
        ([0] * 60, 5, {}, ["60", "max_tokens 5", "65", "context holds 64", "lower max_tokens to 4"]),
        ([0] * 20, None, {"num_blocks": 5}, ["20 tokens", "whole KV cache holds 20"]),
        ([0] * 15, 6, {"num_blocks": 5}, ["15", "21", "whole KV cache holds 20", "lower max_tokens to 5"]),
    ],
)
def test_what_can_never_fit_is_refused(
    tokens: list[int], max_tokens: int | None, sizes: dict[str, int], numbers: list[str]
) -> None:
    scheduler = Scheduler(make_config(**sizes))
    with pytest.raises(RequestError) as caught:
        scheduler.add(make_request("a", tokens, max_tokens))
    assert all(number in str(caught.value) for number in numbers)
    assert caught.value.field in ("prompt", "max_tokens")
    assert not scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", [0]))
    with pytest.raises(RequestError, match="'a'"):
        scheduler.add(make_request("a", [1]))


def test_media_outside_of_the_prompt_are_the_plugins_fault() -> None:
    media = (Media("image", 2, 4, b"", None),)
    with pytest.raises(PluginError, match="2 to 6 of a prompt of 5 tokens"):
        Scheduler(make_config()).add(Request("a", (0,) * 5, SamplingParams(), (), media))


def test_a_failed_step_ends_every_request_with_the_reason() -> None:
    scheduler = Scheduler(make_config(max_sequences=1))
    for name in "ab":
        scheduler.add(make_request(name, [0] * 9))
    assert scheduler.schedule() is not None
    outputs = scheduler.fail("the device is gone")
    assert [(output.id, output.finish, output.error) for output in outputs] == [
        ("a", "error", "the device is gone"),
        ("b", "error", "the device is gone"),
    ]
    assert not scheduler.has_work
    scheduler.check()
    scheduler.add(make_request("c", [0] * 9))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.prefix_hits == 0


def test_an_abort_of_an_ended_request_says_nothing() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", [0]))
    output = scheduler.abort("a")
    assert output is not None
    assert output.finish == "abort"
    assert scheduler.abort("a") is None
    assert not scheduler.has_work


def test_stats_tell_of_the_step() -> None:
    scheduler = Scheduler(make_config(max_sequences=1))
    for name in "ab":
        scheduler.add(make_request(name, [0] * 9))
    plan = scheduler.schedule()
    assert plan is not None
    stats = scheduler.stats(plan)
    assert (stats.num_tokens, stats.num_sampled, stats.num_running, stats.num_waiting) == (9, 1, 1, 1)
    assert (stats.free_blocks, stats.total_blocks, stats.prefix_queries, stats.prefix_hits) == (29, 32, 9, 0)


@pytest.mark.parametrize(
    "sizes", [{"block_size": 0}, {"num_blocks": 0}, {"chunk": 0}, {"max_step_tokens": 3, "max_sequences": 4}]
)
def test_sizes_that_cannot_work_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(sizes))):
        make_config(**sizes)
