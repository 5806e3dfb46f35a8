"""Whether the fast path says what the references say: `python bench/truth.py --shape bench/shapes/llama-3.1-8b.json`.

An engine answers greedily, in batches of 1 to 200 requests, so that each kernel has its numbers of rows; on a GPU its
decode steps are replayed graphs. The logits of every step are kept. A second engine, in which every op is its reference
in plain torch, then gives its logits for each prompt with its answer. Printed are how far the two are apart, relative
to the reference, and how often the token that was drawn is the reference's likeliest. Positions that are further off
than the others are named one by one, with the step that made them.

The reference rounds what it makes between two ops, and the fast path elsewhere, which sets them apart the more, the
more layers there are: with random weights of llama-3.1-8b's width by 2.4e-2 in 8 layers and 3.5e-2 in 16 in bfloat16,
by 4.5e-3 in 16 in float16 (`--dtype float16`, the same kernels), both measured on a CPU. So what is held against the
fast path is how far each of the two is from the reference in float32, on the same weights, and in float16 their
distance too: docs/accuracy.md has the bounds. The exit status is 1 where one is missed.

`--repeat 20` answers everything as often by the same engine, and compares the logits bit by bit: what depends on which
kernel runs first shows there.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from plexor.benchmark.shape import shape_folder
from plexor.checkpoint.folder import ModelFolder
from plexor.checkpoint.random import draw_weights
from plexor.config import EngineConfig
from plexor.errors import ConfigError, PlexorError
from plexor.extension.catalog import Catalog
from plexor.kernels.table import REFERENCE, resolve
from plexor.runtime.core import EngineCore
from plexor.runtime.loading import choose_device, choose_dtype
from plexor.runtime.prompts import find_folder
from plexor.runtime.request import Request, SamplingParams
from plexor.runtime.scheduler import Plan

MOST_ERROR = 1e-2
LEAST_AGREEMENT = 0.99
MOST_RATIO = 1.1
"""Distance of the fast path from float32, where that of the references is 1."""

DECIDED = 2
"""Two logits count as apart when they are so many times as far from each other as a logit is off."""

OUTLIER = 8
"""A position is named that is so many times as far off as the median, and by more than MOST_ERROR."""

MOST_NAMED = 12
REQUESTS = (1, 8, 16, 40, 100, 200)
LEAST_STEPS = 3
"""The first decode step of so many requests is launched kernel by kernel; those after it are replayed."""

LONG_PROMPT = 2049
"""Tokens of the first prompt of each batch, so that kernels for long prompts take part."""

SHORT_PROMPTS = range(3, 51, 2)


@dataclass(frozen=True, slots=True)
class Model:
    """What is run, and in which dtype random weights are drawn."""

    config: EngineConfig
    catalog: Catalog
    folder: ModelFolder
    dtype: torch.dtype

    @classmethod
    def of(cls, config: EngineConfig) -> Model:
        catalog = Catalog.load()
        folder = find_folder(config, catalog)
        return cls(config, catalog, folder, choose_dtype(config.dtype, folder.config))

    def in_plain_torch(self, dtype: str) -> Model:
        """Every op by its reference, kernel by kernel, on the same weights."""
        kernels = dict.fromkeys(self.catalog.ops, REFERENCE)
        config = replace(self.config, dtype=dtype, kernels=kernels, decode_graphs=False, steps_ahead=0)
        return replace(self, config=config)

    def __str__(self) -> str:
        device = choose_device(self.config.device)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        formats = f"precision {self.config.precision}, KV {self.config.kv}, {name_of(self.dtype)}"
        return f"{self.folder.path.name}, {formats}, {where}, torch {torch.__version__}"


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered together, each with so many tokens."""

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int

    def blocks(self, block_size: int) -> int:
        """Of the cache, for all of it at once."""
        return sum(-(-(len(prompt) + self.num_tokens) // block_size) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Answer:
    """token_ids [n] were drawn for a prompt, from the logits [n, V], in steps [n]."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: Tensor
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """What sets answers apart from true logits, for each position, float64 on the CPU.

    error, norm: norms of the difference and of the true logits. noise: root mean square of the difference. gap:
    between the two likeliest tokens. step: by which numbers of the answers' dtype as large as the likeliest one differ.
    parted: whether another token was drawn.
    """

    error: Tensor
    norm: Tensor
    noise: Tensor
    gap: Tensor
    step: Tensor
    parted: Tensor

    @classmethod
    def together(cls, parts: Iterable[Difference]) -> Difference:
        found = list(parts)
        return cls(*(torch.cat([getattr(part, field.name) for part in found]) for field in fields(cls)))

    @property
    def relative(self) -> float:
        return float(self.error.norm() / self.norm.norm())

    @property
    def worst(self) -> float:
        return float(self.each.max())

    @property
    def each(self) -> Tensor:
        """The relative error of each position."""
        return self.error / self.norm

    @property
    def outliers(self) -> list[int]:
        """Positions that are much further off than the others, the worst first."""
        each = self.each
        found = (each > max(OUTLIER * float(each.median()), MOST_ERROR)).nonzero().flatten().tolist()
        return sorted(found, key=lambda position: -float(each[position]))

    @property
    def agreement(self) -> float:
        return 1 - float(self.parted.mean())

    @property
    def decided(self) -> Tensor:
        """Positions whose two likeliest tokens are further apart than errors would bring them."""
        return self.gap > DECIDED * self.noise.square().mean().sqrt()

    @property
    def decided_agreement(self) -> float:
        """1 where no position is decided."""
        return 1 - share(self.parted[self.decided]) if bool(self.decided.any()) else 1.0

    @property
    def is_close(self) -> bool:
        """Whether it keeps to the bounds that hold with no regard to how the references round."""
        return self.relative < MOST_ERROR and self.agreement > LEAST_AGREEMENT


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", metavar="FILE", help="a config.json: run this shape with random weights")
    what.add_argument("--model", metavar="NAME", help="a checkpoint folder or name")
    parser.add_argument("--precision", default="dense")
    parser.add_argument("--kv", default="dense")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS, help="of each batch")
    parser.add_argument("--positions", type=int, default=2000, help="decoded in all batches together, at least")
    parser.add_argument(
        "--long-prompt", type=int, default=LONG_PROMPT, metavar="TOKENS", help="the first of each batch"
    )
    parser.add_argument(
        "--repeat", type=int, default=0, metavar="N", help="answer N times more, and compare the logits"
    )
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare both with the reference in float32, too",
    )
    chosen = parser.parse_args(arguments)
    config = EngineConfig(
        model=chosen.model,
        precision=chosen.precision,
        kv=chosen.kv,
        dtype=chosen.dtype,
        device=chosen.device,
        max_sequences=max(chosen.requests),
        prefix_caching=False,
    )
    if chosen.model is not None:
        return int(not holds(Model.of(config), chosen))
    with shape_folder(Path(chosen.shape).expanduser()) as folder:
        return int(not holds(Model.of(replace(config, model=str(folder), weights="random")), chosen))


def holds(model: Model, chosen: argparse.Namespace) -> bool:
    """Measure, print, and say whether the fast path keeps to the bounds."""
    batches = plan_batches(model, chosen.requests, chosen.positions, chosen.long_prompt)
    blocks = max(batch.blocks(model.config.block_size) for batch in batches)
    model = replace(model, config=replace(model.config, num_blocks=blocks))
    with timed("the fast path"):
        answers, strayed = answer_batches(model, batches, chosen.repeat)
    with timed("the references"):
        truths = true_logits(model.in_plain_torch(model.config.dtype), answers)
    print(f"{model}: the fast path against the references\n")
    print("| requests | positions | relative error | worst position | same token |\n|---|---|---|---|---|")
    found = [differences(*both) for both in zip(answers, truths, strict=True)]
    for batch, of_batch in zip(batches, found, strict=True):
        print(row(str(len(batch.prompts)), of_batch))
    together = Difference.together(found)
    print(row("all", together), flush=True)
    ratio = None
    if chosen.float32 and model.dtype != torch.float32:
        ratio = against_float32(model, answers, truths)
    named = [line for both in zip(answers, found, strict=True) for line in about_outliers(*both)]
    bounds = verdicts(together, model.dtype, ratio)
    if chosen.repeat:
        bounds[f"logits that {chosen.repeat} more rounds gave otherwise: {len(strayed)}, none may"] = not strayed
    print(
        "\n".join([f"\n{about_gaps(together, name_of(model.dtype))}", *named[:MOST_NAMED], *strayed[:MOST_NAMED], ""])
    )
    for said, kept in bounds.items():
        print(f"{'Held' if kept else 'MISSED'}: {said}.")
    print(plain_bounds(together))
    return all(bounds.values())


def against_float32(model: Model, answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Tensor]]) -> float:
    """How many times as far from float32 the fast path is as the references are."""
    with timed("the references in float32"):
        exact = true_logits(model.in_plain_torch("float32"), answers)
    rounded = [list(map(drawn_from, *both)) for both in zip(answers, truths, strict=True)]
    fast, plain = (Difference.together(map(differences, own, exact)) for own in (answers, rounded))
    print(row("the fast path against float32", fast))
    print(row("the references against float32", plain), flush=True)
    return fast.relative / plain.relative


def plan_batches(model: Model, requests: Sequence[int], positions: int, long_prompt: int) -> list[Batch]:
    """A batch of each number of requests; each decodes its share of the positions, in as many steps as that takes."""
    config = resolve(model.catalog.architecture(model.folder.architecture).config)(model.folder.config)
    draw = random.Random(7)
    batches = []
    for count in requests:
        num_tokens = 1 + max(LEAST_STEPS, -(-positions // (len(requests) * count)))
        lengths = [long_prompt, *(SHORT_PROMPTS[index % len(SHORT_PROMPTS)] for index in range(1, count))]
        if max(lengths) + num_tokens > config.max_positions:
            raise ConfigError(
                f"a prompt of {max(lengths)} tokens and {num_tokens} more exceed the model's {config.max_positions} "
                "positions: lower --long-prompt or --positions"
            )
        prompts = (tuple(draw.choices(range(config.vocab_size), k=length)) for length in lengths)
        batches.append(Batch(tuple(prompts), num_tokens))
    return batches


def answer_batches(model: Model, batches: Sequence[Batch], repeat: int = 0) -> tuple[list[list[Answer]], list[str]]:
    """Each batch's answers, by one engine, and where those of as many more rounds differ."""
    with opened(model) as core:
        answers = [answer_batch(core, batch) for batch in batches]
        strayed = []
        for number in range(1, repeat + 1):
            for batch, first in zip(batches, answers, strict=True):
                strayed += [f"round {number}: {line}" for line in strayings(first, answer_batch(core, batch))]
    return answers, strayed


def strayings(first: Sequence[Answer], again: Sequence[Answer]) -> list[str]:
    """Where the logits of two rounds differ, up to the first token of each request that does."""
    lines = []
    for request, (one, other) in enumerate(zip(first, again, strict=True)):
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for index in range(min(same + 1, len(one.token_ids))):
            if not torch.equal(one.logits[index], other.logits[index]):
                a, b = one.logits[index].float(), other.logits[index].float()
                off = float((a - b).norm() / a.norm())
                lines.append(f"{place(other, len(again), request, index)}: off by {off:.2e}, {spread(a - b)}")
    return lines


def answer_batch(core: EngineCore, batch: Batch) -> list[Answer]:
    """Greedy answers to prompts that start together."""
    logits: dict[str, list[Tensor]] = defaultdict(list)
    steps: dict[str, list[str]] = defaultdict(list)
    token_ids: dict[str, list[int]] = defaultdict(list)

    def watch(ids: Sequence[str], rows: Tensor) -> None:
        assert core._plan is not None
        made = make_up(core._plan)
        for name, own in zip(ids, rows, strict=True):
            logits[name].append(own)
            steps[name].append(made)

    sampling = SamplingParams(temperature=0, max_tokens=batch.num_tokens, ignore_end=True, seed=0)
    core.watch_logits(watch)
    for index, prompt in enumerate(batch.prompts):
        core.add(Request(str(index), prompt, sampling, ()))
    while core.has_work:
        for output in core.step():
            if output.error is not None:
                raise PlexorError(f"a request failed: {output.error}")
            token_ids[output.id] += output.token_ids
    core.watch_logits(None)
    count = batch.num_tokens
    return [
        Answer(prompt, tuple(token_ids[name]), torch.stack(logits[name][:count]), tuple(steps[name][:count]))
        for name, prompt in ((str(index), prompt) for index, prompt in enumerate(batch.prompts))
    ]


def make_up(plan: Plan) -> str:
    pieces = f", {len(plan.pieces)} pieces of {plan.num_tokens - len(plan.decodes)} rows" if plan.pieces else ""
    return f"step {plan.step} of {len(plan.decodes)} decodes{pieces}"


def true_logits(model: Model, answers: Sequence[Sequence[Answer]]) -> list[list[Tensor]]:
    """The logits [n, V] of each answer's positions, its tokens given."""
    with opened(model) as core:
        return [[forced_logits(core, answer) for answer in batch] for batch in answers]


def forced_logits(core: EngineCore, answer: Answer) -> Tensor:
    whole = core.logits([*answer.prompt, *answer.token_ids[:-1]])
    return whole[len(answer.prompt) - 1 :].clone()


@contextmanager
def opened(model: Model) -> Iterator[EngineCore]:
    """An engine, once what the last one held is free. Random weights are those of the model's dtype in any other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with closing(EngineCore(model.config, model.catalog, model.folder)) as core:
        if model.config.weights == "random" and choose_dtype(model.config.dtype, model.folder.config) != model.dtype:
            draw_weights(core._ranks.rank.built.module, model.dtype, core.device, seed=0)
        yield core


def differences(answers: Sequence[Answer], truths: Sequence[Tensor]) -> Difference:
    return Difference.together(map(difference, answers, truths))


def difference(answer: Answer, truth: Tensor) -> Difference:
    """Between an answer's logits and true ones [n, V]."""
    truth = truth.float()
    top = truth.topk(2)
    drawn = torch.tensor(answer.token_ids, device=truth.device)
    exponent = top.values[:, 0].abs().log2().floor()
    error = torch.linalg.vector_norm(answer.logits.float() - truth, dim=1)
    parts = (
        error,
        torch.linalg.vector_norm(truth, dim=1),
        error / truth.shape[1] ** 0.5,
        top.values[:, 0] - top.values[:, 1],
        torch.exp2(exponent) * torch.finfo(answer.logits.dtype).eps,
        drawn != truth.argmax(dim=1),
    )
    return Difference(*(part.double().cpu() for part in parts))


def drawn_from(answer: Answer, logits: Tensor) -> Answer:
    """What these logits would have drawn at the answer's positions."""
    return Answer(answer.prompt, tuple(logits.argmax(dim=1).tolist()), logits)


def row(name: str, found: Difference) -> str:
    return f"| {name} | {len(found.error)} | {found.relative:.2e} | {found.worst:.2e} | {100 * found.agreement:.2f} % |"


def about_gaps(found: Difference, dtype: str) -> str:
    """How close the two likeliest tokens are, everywhere and where another one was drawn."""
    wide = found.gap > found.step
    lines = [
        f"The reference's two likeliest tokens are {median(found.gap)} apart in the median; a step of {dtype} is "
        f"{median(found.step)} there.",
        f"At {100 * (1 - share(wide)):.1f} % of the positions they are no more than a step apart.",
    ]
    if bool(found.parted.any()):
        gaps = found.gap[found.parted.bool()]
        lines.append(
            f"Another token was drawn at {len(gaps)} of {len(found.gap)} positions: they are {median(gaps)} apart in "
            f"the median there, {float(gaps.max()):.3g} at most, and equal at {int((gaps == 0).sum())}."
        )
    if bool(wide.any()):
        lines.append(
            f"Where they are further apart, {100 * (1 - share(found.parted[wide])):.2f} % have the same token."
        )
    return "\n".join(lines)


def about_outliers(answers: Sequence[Answer], found: Difference) -> list[str]:
    """What is known of each position that is much further off than the others."""
    places = [(request, index) for request, answer in enumerate(answers) for index in range(len(answer.token_ids))]
    lines = []
    for position in found.outliers:
        request, index = places[position]
        where = place(answers[request], len(answers), request, index)
        lines.append(f"OUTLIER: {where}: off by {float(found.each[position]):.2e}")
    return lines


def place(answer: Answer, num_requests: int, request: int, index: int) -> str:
    made = f", {answer.steps[index]}" if answer.steps else ""
    return f"{num_requests} requests, request {request} (prompt of {len(answer.prompt)}), token {index}{made}"


def spread(difference: Tensor) -> str:
    """Over how many logits a difference [V] is spread."""
    squares = difference.square().sort(descending=True).values.cumsum(0)
    most = int((squares < 0.9 * squares[-1]).sum()) + 1
    return f"{int((difference != 0).sum())} logits differ, {most} of them make up 90 % of it"


def verdicts(found: Difference, dtype: torch.dtype, ratio: float | None) -> dict[str, bool]:
    """The bounds that decide, in words with what was measured, and whether each is kept."""
    outliers = len(found.outliers)
    bounds = {
        f"{outliers} positions are more than {OUTLIER} times as far off as the median, none may": outliers == 0,
    }
    if ratio is not None:
        said = (
            f"from float32 the fast path is {ratio:.2f} times as far as the references are, at most {MOST_RATIO} may be"
        )
        bounds[said] = ratio <= MOST_RATIO
    if ratio is None or dtype != torch.bfloat16:
        said = f"the relative error is {found.relative:.2e}, and must be below {MOST_ERROR:.0e}"
        bounds[said] = found.relative < MOST_ERROR
        said = (
            f"{100 * found.decided_agreement:.2f} % of the {int(found.decided.sum())} positions whose two likeliest "
            f"tokens are more than {DECIDED} errors apart have the same token, and {100 * LEAST_AGREEMENT:.0f} % must"
        )
        bounds[said] = found.decided_agreement >= LEAST_AGREEMENT
    return bounds


def plain_bounds(found: Difference) -> str:
    kept = "held" if found.is_close else "MISSED"
    agreement, least = 100 * found.agreement, 100 * LEAST_AGREEMENT
    return (
        f"With no regard to how the references round, {kept}: the relative error is {found.relative:.2e} (below "
        f"{MOST_ERROR:.0e}), and {agreement:.2f} % have the same token (more than {least:.0f} %)."
    )


def median(values: Tensor) -> str:
    return f"{float(values.median()):.3g}"


def share(truths: Tensor) -> float:
    return float(truths.double().mean())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = perf_counter()
    yield
    print(f"{what}: {perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
