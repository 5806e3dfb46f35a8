"""Whether the fast path says what the references say: `python bench/truth.py --shape bench/shapes/llama-3.1-8b.json`.

An engine answers greedily, in batches of 1 to 200 requests, so that each kernel has its numbers of rows; on a GPU its
decode steps are replayed graphs. The logits of every step are kept. A second engine, in which every op is its reference
in plain torch, then gives its logits for each prompt with its answer. Printed are how far the two are apart, relative
to the reference, and how often the token that was drawn is the reference's likeliest; the exit status is 1 where either
misses its limit.

The reference rounds what it makes between two ops, and the fast path elsewhere, which sets them apart the more, the
more layers there are: with random weights of llama-3.1-8b's width by 2.4e-2 in 8 layers and 3.5e-2 in 16 in bfloat16,
by 4.5e-3 in 16 in float16 (`--dtype float16`, the same kernels), both measured on a CPU. `--float32` shows how far each
is from the reference in float32, on the same weights: the fast path should be no further than the other.
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

MOST_ERROR = 1e-2
LEAST_AGREEMENT = 0.99
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
    """token_ids [n] were drawn for a prompt, from the logits [n, V]."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """What sets answers apart from true logits, for each position, float64 on the CPU.

    error, norm: norms of the difference and of the true logits. gap: between the two likeliest tokens. step: by which
    numbers of the answers' dtype as large as the likeliest one differ. parted: whether another token was drawn.
    """

    error: Tensor
    norm: Tensor
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
        return float((self.error / self.norm).max())

    @property
    def agreement(self) -> float:
        return 1 - float(self.parted.mean())

    @property
    def holds(self) -> bool:
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
    parser.add_argument("--float32", action="store_true", help="compare both with the reference in float32, too")
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
    """Measure, print, and say whether the fast path keeps to the limits."""
    batches = plan_batches(model, chosen.requests, chosen.positions, chosen.long_prompt)
    blocks = max(batch.blocks(model.config.block_size) for batch in batches)
    model = replace(model, config=replace(model.config, num_blocks=blocks))
    with timed("the fast path"):
        answers = answer_batches(model, batches)
    with timed("the references"):
        truths = true_logits(model.in_plain_torch(model.config.dtype), answers)
    print(f"{model}: the fast path against the references\n")
    print("| requests | positions | relative error | worst position | same token |\n|---|---|---|---|---|")
    found = [differences(*both) for both in zip(answers, truths, strict=True)]
    for batch, of_batch in zip(batches, found, strict=True):
        print(row(str(len(batch.prompts)), of_batch))
    together = Difference.together(found)
    print(row("all", together), flush=True)
    if chosen.float32 and model.dtype != torch.float32:
        with timed("the references in float32"):
            exact = true_logits(model.in_plain_torch("float32"), answers)
        rounded = [list(map(drawn_from, *both)) for both in zip(answers, truths, strict=True)]
        fast, plain = (Difference.together(map(differences, own, exact)) for own in (answers, rounded))
        print(row("the fast path against float32", fast))
        print(row("the references against float32", plain))
        print(
            f"\nFrom float32 the fast path is {fast.relative / plain.relative:.2f} times as far as the references are."
        )
    print(f"\n{about_gaps(together, name_of(model.dtype))}\n{verdict(together)}")
    return together.holds


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


def answer_batches(model: Model, batches: Sequence[Batch]) -> list[list[Answer]]:
    """Each batch's answers, by one engine."""
    with opened(model) as core:
        return [answer_batch(core, batch) for batch in batches]


def answer_batch(core: EngineCore, batch: Batch) -> list[Answer]:
    """Greedy answers to prompts that start together."""
    logits: dict[str, list[Tensor]] = defaultdict(list)
    token_ids: dict[str, list[int]] = defaultdict(list)

    def watch(ids: Sequence[str], rows: Tensor) -> None:
        for name, own in zip(ids, rows, strict=True):
            logits[name].append(own)

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
    return [
        Answer(prompt, tuple(token_ids[name]), torch.stack(logits[name][: batch.num_tokens]))
        for name, prompt in ((str(index), prompt) for index, prompt in enumerate(batch.prompts))
    ]


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
    parts = (
        torch.linalg.vector_norm(answer.logits.float() - truth, dim=1),
        torch.linalg.vector_norm(truth, dim=1),
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


def verdict(found: Difference) -> str:
    return (
        f"{'Held' if found.holds else 'MISSED'}: the relative error is {found.relative:.2e} and must be below "
        f"{MOST_ERROR:.0e}; {100 * found.agreement:.2f} % have the same token and more than "
        f"{100 * LEAST_AGREEMENT:.0f} % must."
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
