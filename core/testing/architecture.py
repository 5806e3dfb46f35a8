"""Hold an architecture to transformers' own implementation of it: logits at every position, and greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache, Pages
from plexor.checkpoint.folder import open_folder
from plexor.config import EngineConfig
from plexor.extension.catalog import Catalog
from plexor.parallel.mesh import Mesh
from plexor.runtime import loading
from plexor.runtime.engine import Completion, Engine
from plexor.runtime.kv_cache import allocate
from plexor.runtime.loading import BuiltModel, Placement
from plexor.runtime.request import Output, SamplingParams
from plexor.runtime.stats import StepStats

CPU = torch.device("cpu")
ONE_RANK = Mesh()
WHOLE = 1 << 30
LENGTHS = (1, 13, 4, 30, 8)
"""Of the prompts that are tried: one token, a full block, both sides of a block's border."""

NUM_PADDING = 2
BLOCK_SIZE = 4


def load_model(
    folder: Path,
    catalog: Catalog | None = None,
    *,
    mesh: Mesh = ONE_RANK,
    precision: str = "dense",
    kv: str = "dense",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    kernels: Mapping[str, str] | None = None,
) -> BuiltModel:
    """What the engine loads: `.model`, `.config` and `.build`; from the installed plugins unless a catalog is given.

    kernels: op to provider, over the table's choice.
    """
    catalog = catalog or Catalog.load()
    placement = Placement(device=device, dtype=dtype, precision=precision, kv=kv, mesh=mesh)
    return loading.load_model(open_folder(folder), catalog, catalog.kernel_table(kernels), placement)[0]


def random_prompts(vocab_size: int, lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def check_architecture(
    folder: Path, catalog: Catalog | None = None, *, tolerance: float = 1e-4, reach: int | None = None
) -> None:
    """Logits of a checkpoint in float32 against transformers': prompts in one batch, one by one, in chunks of 7, and in
    pieces of several sizes side by side. AssertionError says which, where and by how much.

    reach: the longest prompt, if the usual ones do not reach what is to be tested.
    """
    built = load_model(folder, catalog)
    prompts = random_prompts(built.config.vocab_size, LENGTHS if reach is None else (*LENGTHS, reach))
    expected = expected_logits(folder, prompts)
    _check_telling(expected)
    for name, pieces in (("in one batch", (WHOLE,)), ("in chunks of 7", (7,)), ("in mixed pieces", (5, 1, WHOLE, 2))):
        _compare(name, run(built, prompts, pieces), expected, tolerance)
    alone = [run(built, [prompt], (WHOLE,))[0] for prompt in prompts]
    _compare("one by one", alone, expected, tolerance)


def check_generation(
    folder: Path, catalog: Catalog | None = None, *, num_tokens: int = 12, config: EngineConfig | None = None
) -> None:
    """Greedy tokens of the engine in float32 against transformers' `generate`: prompts together, one by one, in chunks
    of 7, again with prefixes from the cache, and with a cache so small that sequences are preempted.
    """
    base = replace(
        config or EngineConfig(), model=str(folder), dtype="float32", device="cpu", block_size=4, num_blocks=128
    )
    prompts = random_prompts(_vocab_size(folder))
    expected = expected_tokens(folder, prompts, num_tokens)
    blocks_of_longest = -(-(max(LENGTHS) + num_tokens) // base.block_size) + 1
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    with Engine(config=base, catalog=catalog) as engine:
        _compare_tokens("together", engine.generate(prompts, sampling), expected)
        again = engine.generate(prompts, sampling)
        _compare_tokens("with prefix hits", again, expected)
        assert max(completion.num_cached_tokens for completion in again) > 0, "no prefix was found in the cache"
    with Engine(config=replace(base, chunk=7, prefix_caching=False), catalog=catalog) as engine:
        _compare_tokens("in chunks of 7", engine.generate(prompts, sampling), expected)
        _compare_tokens("one by one", [engine.generate(p, sampling)[0] for p in prompts], expected)
    with Engine(config=replace(base, num_blocks=blocks_of_longest), catalog=catalog) as engine:
        preemptions = _Preemptions()
        engine.core.observe(preemptions)
        _compare_tokens("after preemption", engine.generate(prompts, sampling), expected)
        assert preemptions.count > 0, f"{blocks_of_longest} blocks sufficed for all, so none was preempted"


def expected_logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Transformers' logits [n, V] of each prompt, eager attention, float32, no padding."""
    oracle = _oracle(folder)
    with torch.no_grad():
        return [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]


def expected_tokens(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Transformers' greedy continuation of each prompt, its end token included."""
    oracle = _oracle(folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        answer = oracle.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


def run(built: BuiltModel, sequences: Sequence[Sequence[int]], pieces: Sequence[int]) -> list[Tensor]:
    """Logits [n, V] at every position of each sequence, over a paged cache whose blocks are handed out at random.

    pieces: how many tokens a sequence advances in a step; sequence s takes pieces[(s + i) % len(pieces)] in step i, so
    that long and short pieces stand side by side. Each step ends with rows of padding.
    """
    cache = _Cache(built, sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    step = 0
    while any(count < len(tokens) for count, tokens in zip(done, sequences, strict=True)):
        chosen = [
            _Piece(index, done[index], min(pieces[(index + step) % len(pieces)], len(tokens) - done[index]))
            for index, tokens in enumerate(sequences)
            if done[index] < len(tokens)
        ]
        for piece, rows in zip(chosen, _step(built, cache, sequences, chosen), strict=True):
            logits[piece.sequence].append(rows)
            done[piece.sequence] += piece.length
        step += 1
    return [torch.cat(rows) for rows in logits]


class _Preemptions:
    """A StepObserver that counts them."""

    def __init__(self) -> None:
        self.count = 0

    def on_step(self, stats: StepStats) -> None:
        self.count += stats.num_preempted

    def on_finish(self, output: Output) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens start to start + length of a sequence."""

    sequence: int
    start: int
    length: int


class _Cache:
    """A paged cache with room for all sequences; what is not written yet is far from zero, so that reading it shows."""

    def __init__(self, built: BuiltModel, sequences: Sequence[Sequence[int]]) -> None:
        each = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        order = torch.randperm(sum(each), generator=torch.Generator().manual_seed(1)).tolist()
        self.layers: tuple[LayerCache, ...] = allocate(built.model, built.build, len(order), BLOCK_SIZE)
        for layer in self.layers:
            for tensor in layer.values():
                tensor.fill_(7)
        self.blocks = [[order.pop() for _ in range(count)] for count in each]

    def slot(self, sequence: int, position: int) -> int:
        """Where the entry of a sequence's position goes."""
        block: int = self.blocks[sequence][position // BLOCK_SIZE]
        return block * BLOCK_SIZE + position % BLOCK_SIZE


def _step(
    built: BuiltModel, cache: _Cache, sequences: Sequence[Sequence[int]], pieces: Sequence[_Piece]
) -> tuple[Tensor, ...]:
    """One forward; the logits of each piece's rows."""
    device = built.build.device
    spots = [(piece.sequence, piece.start + i) for piece in pieces for i in range(piece.length)]
    padding = [0] * NUM_PADDING
    token_ids = [sequences[sequence][position] for sequence, position in spots] + padding
    slots = [cache.slot(sequence, position) for sequence, position in spots] + [-1] * NUM_PADDING
    positions = [position for _, position in spots] + padding
    lengths = [piece.length for piece in pieces]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    seen = [piece.start + piece.length for piece in pieces]
    tables = [cache.blocks[piece.sequence] for piece in pieces]
    widest = max(len(table) for table in tables)
    pages = Pages(
        query_start=ends.to(device, torch.int32),
        kv_length=torch.tensor(seen, dtype=torch.int32, device=device),
        block_table=torch.tensor(
            [table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32, device=device
        ),
        max_query=max(lengths),
    )
    ctx = ForwardContext(pages, torch.tensor(slots, device=device), None, cache.layers)
    batch = Batch(torch.tensor(token_ids, device=device), torch.tensor(positions, device=device))
    with torch.inference_mode():
        logits = built.model.logits(built.model.forward(batch, ctx))
    return torch.split(logits[: len(spots)].cpu(), lengths)


def _oracle(folder: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    # Left to choose, transformers multiplies experts with a product of torch's that takes no odd sizes.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return auto.from_pretrained(folder, dtype=torch.float32, **eager).eval()


def _vocab_size(folder: Path) -> int:
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    return int(config.get_text_config().vocab_size)


def _check_telling(logits: Sequence[Tensor]) -> None:
    """The comparison means something only if the logits differ between tokens and between positions."""
    rows = torch.cat(list(logits))
    for what, axis in (("positions", 0), ("tokens", 1)):
        spread = float(rows.std(dim=axis).mean())
        assert spread > 0.1, f"the checkpoint's logits hardly differ between {what} ({spread:.3g}): draw another"


def _compare(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape, f"{name}: logits {list(ours.shape)} instead of {list(theirs.shape)}"
        error = (ours - theirs).abs().amax(dim=-1)
        worst = int(error.nan_to_num(nan=float("inf")).argmax())
        assert bool((error <= tolerance).all()), (
            f"{name}: prompt {index} of {len(theirs)} tokens, position {worst}: off by {float(error[worst]):.3g}, "
            f"which is more than {tolerance:.3g}"
        )


def _compare_tokens(name: str, actual: Sequence[Completion], expected: Sequence[Sequence[int]]) -> None:
    for index, (completion, tokens) in enumerate(zip(actual, expected, strict=True)):
        assert completion.error is None, f"{name}: prompt {index} failed: {completion.error}"
        assert completion.token_ids == [*tokens], f"{name}: prompt {index}: {completion.token_ids}, not {[*tokens]}"
