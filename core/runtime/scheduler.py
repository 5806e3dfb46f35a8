"""Chooses what each step computes: in-flight batching under one token budget, one step ahead of the device.

The order of a step: decodes, oldest first; then unfinished prompts; then waiting requests, first come first served.
Where a decode finds no free block, the youngest running sequence gives up its blocks and is computed again later.

One step ahead means that `schedule` for step n + 1 may come before `commit` of step n. So `computed` advances when a
step is scheduled, a drawn but unread token counts as `in_flight`, and a sequence that turns out to have ended in step
n leaves a row in step n + 1 that `commit` drops. Its blocks are given away at once, because the device runs steps in
order: whoever gets them writes after the last step that could still write for the old owner.
"""

from __future__ import annotations

import secrets
from bisect import insort
from collections import deque
from collections.abc import Sequence as Vector
from dataclasses import dataclass, field
from itertools import repeat

from plexor.errors import ConfigError, PluginError, RequestError
from plexor.runtime.blocks import BlockPool
from plexor.runtime.request import FinishReason, Output, Request, TokenLogprobs
from plexor.runtime.sequence import Sequence, State
from plexor.runtime.stats import StepStats


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The sizes that the scheduler keeps to.

    max_sequences: running at once. max_step_tokens: the budget of one step. max_length: the context, prompt and answer
    together. chunk: longest piece of a prompt in one step, None for the whole budget.

    Raises ConfigError for sizes that cannot work.
    """

    block_size: int
    num_blocks: int
    max_sequences: int
    max_step_tokens: int
    max_length: int
    prefix_caching: bool = True
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_sequences", "max_step_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"chunk is {self.chunk}, but must be at least 1, or None for the whole step")
        if self.max_step_tokens < self.max_sequences:
            raise ConfigError(
                f"max_step_tokens is {self.max_step_tokens}, but each of the {self.max_sequences} running sequences "
                "that max_sequences allows needs a token in a step: raise the first or lower the second"
            )

    @property
    def capacity(self) -> int:
        """Cache entries in the whole pool."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a prompt (or of a sequence that starts again) that a step computes: tokens start to start + length.

    samples: whether the token after it is drawn, which is so when the piece reaches the sequence's end.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes: one token of each of `decodes`, and `pieces` of prompts.

    rows: the sequences that a token is drawn for, decodes first. blocks: (sequence, index of the first, blocks) of what
    was allocated or shared for the step. admitted: sequences that start, or start again after preemption, and are new
    to the runner. preempted: ids of the requests that lost their blocks. prefix_queries, prefix_hits: tokens looked up
    and found. started: ids of the requests that start for the first time.
    """

    step: int
    decodes: tuple[Sequence, ...]
    pieces: tuple[Piece, ...]
    rows: tuple[Sequence, ...] = ()
    blocks: tuple[tuple[Sequence, int, list[int]], ...] = ()
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[str, ...] = ()
    prefix_queries: int = 0
    prefix_hits: int = 0
    started: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decodes) + sum(piece.length for piece in self.pieces)


@dataclass(slots=True)
class _Draft:
    """A plan while it is made: nothing in it has touched a sequence's counters yet."""

    budget: int
    decodes: list[Sequence] = field(default_factory=list)
    pieces: list[tuple[Sequence, int]] = field(default_factory=list)
    blocks: list[tuple[Sequence, int, list[int]]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    computing: set[bytes] = field(default_factory=set)  # hashes of the prompt blocks that this step fills
    started: list[str] = field(default_factory=list)
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Owns the sequences and the block pool; knows nothing of devices."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self._running: list[Sequence] = []  # oldest first
        self._unread: list[Sequence] = []  # those of them that have pieces left to compute, oldest first
        self._waiting: list[Sequence] = []  # oldest first
        self._live: dict[str, Sequence] = {}
        self._launched: deque[Plan] = deque()
        self._free_slots = list(range(config.max_sequences - 1, -1, -1))
        self._num_added = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a scheduled step is not committed."""
        return bool(self._live or self._launched)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the line.

        Raises RequestError for an id in use, an empty prompt, and a prompt or answer that can never fit.
        """
        if request.id in self._live:
            raise RequestError(f"a request with the id {request.id!r} is running: use another id", field="id")
        _check_media(request)
        limit = self._answer_limit(len(request.tokens), request.sampling.max_tokens)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        sequence = Sequence(request, order=self._num_added, limit=limit, seed=seed)
        self._num_added += 1
        self._live[request.id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> Output | None:
        """Ends a request at its client's wish; its last output, or None if it has ended already."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Output | None:
        """Ends a request for a reason found outside (a stop string); its last output, or None if it has ended."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return _output(sequence, finish=reason, stop_reason=stop_reason)

    def fail(self, error: str) -> list[Output]:
        """Ends every request because a step went wrong; steps in flight must not be committed afterwards."""
        failed = list(self._live.values())
        for sequence in failed:
            self._end(sequence)
        self._launched.clear()
        self.pool.forget()
        return [_output(sequence, finish="error", error=error) for sequence in failed]

    def schedule(self) -> Plan | None:
        """The next step, to be packed and launched at once, or None if nothing can be computed before a commit.

        At most one scheduled step may be uncommitted when this is called.
        """
        assert len(self._launched) <= 1, "commit the step before the last one first"
        draft = _Draft(self.config.max_step_tokens)
        self._take_decodes(draft)
        self._take_prompts(draft)
        if not draft.preempted:
            self._admit(draft)
        if not draft.decodes and not draft.pieces:
            return None
        return self._launch(draft)

    def commit(
        self, plan: Plan, sampled: Vector[int], logprobs: Vector[TokenLogprobs | None] | None = None
    ) -> list[Output]:
        """Takes in what a step drew; the outputs of the requests that go on or end with it.

        plan: the oldest uncommitted one. sampled, logprobs: one for each sampling row of the plan, in order.
        """
        assert plan is next(iter(self._launched), None), "steps are committed in the order of their scheduling"
        self._launched.popleft()
        assert len(plan.rows) == len(sampled), f"{len(sampled)} tokens were drawn for {len(plan.rows)} rows"
        drawn = repeat(None) if logprobs is None else logprobs
        return [
            self._append(sequence, token_id, token_logprobs)
            for sequence, token_id, token_logprobs in zip(plan.rows, sampled, drawn, strict=False)
            if sequence.state is not State.FINISHED
        ]

    def stats(self, plan: Plan) -> StepStats:
        """The figures of a step, taken right after it was scheduled."""
        return StepStats(
            num_tokens=plan.num_tokens,
            num_sampled=len(plan.rows),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_preempted=len(plan.preempted),
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_blocks,
            prefix_queries=plan.prefix_queries,
            prefix_hits=plan.prefix_hits,
            started=plan.started,
        )

    def check(self) -> None:
        """Asserts that blocks, slots and lists agree."""
        self.pool.check([sequence.blocks for sequence in self._running])
        assert all(not sequence.blocks and sequence.slot < 0 for sequence in self._waiting)
        slots = self._free_slots + [sequence.slot for sequence in self._running]
        assert sorted(slots) == list(range(self.config.max_sequences)), "a slot is lost or taken twice"
        assert self._unread == [sequence for sequence in self._running if not sequence.decodes]
        for sequences in (self._running, self._waiting):
            assert [sequence.order for sequence in sequences] == sorted(sequence.order for sequence in sequences)
        assert {*self._running, *self._waiting} == set(self._live.values())

    def _answer_limit(self, num_prompt: int, max_tokens: int | None) -> int:
        """How many tokens may be generated; raises RequestError where the request can never fit."""
        context, capacity = self.config.max_length, self.config.capacity
        if num_prompt == 0:
            raise RequestError("the prompt is empty: it needs at least one token", field="prompt")
        for size, holder in ((context, "context"), (capacity, "whole KV cache")):
            if num_prompt >= size:
                raise RequestError(
                    f"the prompt has {num_prompt} tokens, but the {holder} holds {size} and the answer needs at least "
                    f"one of them: shorten the prompt to {size - 1} tokens or fewer",
                    field="prompt",
                )
            if max_tokens is not None and num_prompt + max_tokens > size:
                raise RequestError(
                    f"the prompt's {num_prompt} tokens and max_tokens {max_tokens} make {num_prompt + max_tokens}, but "
                    f"the {holder} holds {size}: lower max_tokens to {size - num_prompt} or shorten the prompt",
                    field="max_tokens",
                )
        return min(context, capacity) - num_prompt if max_tokens is None else max_tokens

    def _take_decodes(self, draft: _Draft) -> None:
        for sequence in tuple(self._running):
            if sequence.decodes and not sequence.is_drained and self._make_room(sequence, draft):
                draft.decodes.append(sequence)
        draft.budget -= len(draft.decodes)

    def _make_room(self, sequence: Sequence, draft: _Draft) -> bool:
        """One more cache entry for a sequence; False if the sequence itself was the youngest and had to give way.

        A victim is never older than the sequence, and decodes are taken oldest first, so no victim is in the draft.
        """
        num_blocks = len(sequence.blocks)
        if sequence.computed < num_blocks * self.config.block_size:
            return True
        while self.pool.num_free == 0:
            victim = self._running[-1]
            self._preempt(victim)
            draft.preempted.append(victim.request.id)
            if victim is sequence:
                return False
        new = self.pool.allocate(1)
        sequence.blocks += new
        draft.blocks.append((sequence, num_blocks, new))
        return True

    def _take_prompts(self, draft: _Draft) -> None:
        """Further pieces of prompts whose blocks were allocated when they were admitted."""
        for sequence in self._unread:
            if draft.budget == 0:
                return
            self._take_piece(sequence, draft)

    def _take_piece(self, sequence: Sequence, draft: _Draft) -> None:
        longest = draft.budget if self.config.chunk is None else min(self.config.chunk, draft.budget)
        length = min(sequence.pending, longest)
        draft.pieces.append((sequence, length))
        draft.budget -= length
        block_size = self.config.block_size
        filled = slice(sequence.computed // block_size, (sequence.computed + length) // block_size)
        draft.computing.update(sequence.hashes[filled])

    def _admit(self, draft: _Draft) -> None:
        index = 0
        while index < len(self._waiting) and self._free_slots and draft.budget > 0:
            sequence = self._waiting[index]
            if sequence.in_flight:
                return  # preempted a moment ago: its last token must be read before it can be computed again
            shared = self._known_prefix(sequence)
            if self._is_being_computed(sequence, len(shared), draft):
                index += 1  # the same prefix runs in this very step: one step later it is there to be shared
                continue
            num_new = -(-sequence.length // self.config.block_size) - len(shared)
            # A block in reserve for each running sequence, or the newcomer would soon be preempted by them.
            if num_new + len(self._running) > self.pool.num_free_after_sharing(shared):
                return
            del self._waiting[index]
            self._start(sequence, shared, num_new, draft)

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks to share; at least the last token is left to compute, because its logits are wanted."""
        if not self.config.prefix_caching:
            return []
        sequence.extend_hashes(self.config.block_size)
        return self.pool.match(sequence.hashes[: (sequence.length - 1) // self.config.block_size])

    def _is_being_computed(self, sequence: Sequence, num_shared: int, draft: _Draft) -> bool:
        """Whether this step computes the block that would be the next to share."""
        if num_shared >= (sequence.length - 1) // self.config.block_size or not self.config.prefix_caching:
            return False
        return sequence.hashes[num_shared] in draft.computing

    def _start(self, sequence: Sequence, shared: list[int], num_new: int, draft: _Draft) -> None:
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(num_new)
        sequence.num_registered = len(shared)
        sequence.computed = len(shared) * self.config.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.computed
            draft.started.append(sequence.request.id)
        sequence.slot = self._free_slots.pop()
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_order)
        insort(self._unread, sequence, key=_order)
        draft.admitted.append(sequence)
        draft.blocks.append((sequence, 0, sequence.blocks[:]))
        if self.config.prefix_caching:
            draft.prefix_queries += sequence.length
            draft.prefix_hits += sequence.computed
        self._take_piece(sequence, draft)

    def _launch(self, draft: _Draft) -> Plan:
        for sequence in draft.decodes:
            sequence.computed += 1
            sequence.in_flight += 1
        pieces = [self._launch_piece(sequence, length) for sequence, length in draft.pieces]
        plan = Plan(
            step=self._num_steps,
            decodes=tuple(draft.decodes),
            pieces=tuple(pieces),
            rows=(*draft.decodes, *(piece.sequence for piece in pieces if piece.samples)),
            blocks=tuple(draft.blocks),
            admitted=tuple(draft.admitted),
            preempted=tuple(draft.preempted),
            prefix_queries=draft.prefix_queries,
            prefix_hits=draft.prefix_hits,
            started=tuple(draft.started),
        )
        self._num_steps += 1
        self._launched.append(plan)
        return plan

    def _launch_piece(self, sequence: Sequence, length: int) -> Piece:
        start = sequence.computed
        sequence.computed += length
        samples = sequence.computed == len(sequence.tokens)
        if samples:
            sequence.in_flight += 1
            sequence.decodes = True
            self._unread.remove(sequence)
        self._register(sequence)
        return Piece(sequence, start, length, samples)

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        sequence.in_flight -= 1
        sequence.tokens.append(token_id)
        # A block is complete with its last token, or a step later where no further step is under way.
        if len(sequence.tokens) % self.config.block_size <= 1:
            self._register(sequence)
        finish, stop_reason = _reason_to_end(sequence, token_id)
        if finish is not None:
            self._end(sequence)
        return _output(
            sequence,
            token_ids=(token_id,),
            logprobs=None if logprobs is None else (logprobs,),
            finish=finish,
            stop_reason=stop_reason,
        )

    def _register(self, sequence: Sequence) -> None:
        """Lets later steps share the blocks whose tokens are known and whose entries are made by launched steps."""
        if not self.config.prefix_caching:
            return
        num_full = min(sequence.computed, len(sequence.tokens)) // self.config.block_size
        if num_full <= sequence.num_registered:
            return
        sequence.extend_hashes(self.config.block_size)
        for index in range(sequence.num_registered, num_full):
            self.pool.register(sequence.blocks[index], sequence.hashes[index])
        sequence.num_registered = num_full

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_order)

    def _end(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        del self._live[sequence.request.id]

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        self._free_slots.append(sequence.slot)
        if not sequence.decodes:
            self._unread.remove(sequence)
        sequence.blocks = []
        sequence.computed = 0
        sequence.slot = -1
        sequence.decodes = False


def _order(sequence: Sequence) -> int:
    return sequence.order


def _reason_to_end(sequence: Sequence, token_id: int) -> tuple[FinishReason | None, int | str | None]:
    """Whether the last known token ends the text. Stops count only after min_tokens tokens that are none."""
    sampling = sequence.request.sampling
    num_read = len(sequence.tokens) - sequence.num_prompt
    if num_read > sampling.min_tokens:
        if token_id in sequence.request.end_ids and not sampling.ignore_end:
            return "stop", None
        if token_id in sampling.stop_token_ids:
            return "stop", token_id
    return ("length", None) if num_read >= sequence.limit else (None, None)


def _output(
    sequence: Sequence,
    *,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] | None = None,
    finish: FinishReason | None = None,
    stop_reason: int | str | None = None,
    error: str | None = None,
) -> Output:
    return Output(
        id=sequence.request.id,
        token_ids=token_ids,
        logprobs=logprobs,
        finish=finish,
        stop_reason=stop_reason,
        error=error,
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached or 0,
    )


def _check_media(request: Request) -> None:
    reached = 0
    for medium in request.media:
        end = medium.start + medium.length
        if medium.length < 1 or medium.start < reached or end > len(request.tokens):
            raise PluginError(
                f"the {medium.kind} processor put placeholders at {medium.start} to {end} of a prompt of "
                f"{len(request.tokens)} tokens whose media reach to {reached}: spans must be ordered and inside the "
                "prompt, so report this to the plugin's authors"
            )
        reached = end
