"""Perplexity, agreement and divergence through the engine equal what transformers and plain torch give."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor

from plexor import Engine, EngineConfig
from plexor.errors import CapacityError, ConfigError, PlexorError, RequestError
from plexor.extension.catalog import Catalog
from plexor.runtime import ledger, scoring
from plexor.runtime.prompts import find_folder
from plexor.runtime.scoring import (
    Score,
    check_comparable,
    compare_text,
    context,
    divergence,
    score_text,
    scoring_config,
)
from plexor.testing.checkpoints import write_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade.\n" * 3
CATALOG = Catalog.load()
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED: dict[str, Any] = {
    "vocab_size": 277,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "max_position_embeddings": 96,
    **ENDS,
}
CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**GROUPED),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        vocab_size=277, n_embd=36, n_head=3, n_layer=2, n_positions=96, **ENDS
    ),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=28
    ),
}


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of logits at a time, which divides no window here."""
    monkeypatch.setattr(scoring, "PART", 7 * 301 + 5)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Two random checkpoints of an architecture, near to each other, which share their tokenizer."""
    architecture: str = request.param
    if architecture not in CATALOG.architectures:
        pytest.skip(f"no installed plugin serves {architecture}")
    folder = tmp_path_factory.mktemp(architecture)
    first = write_checkpoint(folder / "first", architecture, CONFIGS[architecture](), seed=4)
    changed = getattr(transformers, architecture).from_pretrained(first, dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    second = write_checkpoint(folder / "second", architecture, CONFIGS[architecture]())
    changed.save_pretrained(second, max_shard_size=300_000)
    return architecture, first, second


def engine(folder: Path, **changes: Any) -> Engine:
    return Engine(str(folder), config=EngineConfig(**{"num_blocks": 16, "device": "cpu", **changes}))


def pieces(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - 1, size - 1):
        yield ids[start : start + size]


def their_logits(folder: Path, architecture: str, ids: list[int], size: int) -> Tensor:
    """What transformers holds of each token but the first, in the windows of this size, [T - 1, V] in float64."""
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([piece])).logits[0, :-1] for piece in pieces(ids, size)]
    return torch.cat(rows).double()


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("window", [16, 50, 1000])
def test_loss_equals_that_of_transformers(tiny: Path, window: int) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with engine(tiny) as model:
        score = score_text(model, TEXT, window)
        ids = model.prompts.tokenizer.encode(TEXT, add_special_tokens=False)
    total = 0.0
    for piece in pieces(ids, min(window, 128)):
        given = torch.tensor([piece])
        with torch.no_grad():
            total += float(theirs(given, labels=given).loss) * (len(piece) - 1)
    assert score.num_tokens == len(ids) - 1
    assert score.loss == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss * score.num_tokens / math.log(2) / len(TEXT))


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("window", [17, 1000])
def test_likeness_equals_that_of_transformers_logits(pair: tuple[str, Path, Path], window: int) -> None:
    architecture, first, second = pair
    with engine(first) as reference, engine(second) as tested:
        score, likeness = compare_text(tested, reference, TEXT, window)
        alone = score_text(tested, TEXT, window)
        ids = tested.prompts.tokenizer.encode(TEXT, add_special_tokens=False)
    p, q = (their_logits(folder, architecture, ids, min(window, 96)) for folder in (first, second))
    kl = (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)
    assert score == alone
    assert likeness.mean_kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert likeness.p99_kl == pytest.approx(float(numpy.quantile(kl.numpy(), 0.99)), rel=1e-4)
    assert likeness.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < likeness.agreement < 1, "the two models should differ, but not in everything"


def test_a_model_is_wholly_like_itself(tiny: Path) -> None:
    with engine(tiny, num_blocks=5) as reference, engine(tiny) as tested:
        _, likeness = compare_text(tested, reference, TEXT, 50)
    assert (likeness.agreement, likeness.mean_kl, likeness.p99_kl) == (1, 0, 0)


def test_the_reference_is_what_the_tested_is_measured_from(pair: tuple[str, Path, Path]) -> None:
    """KL is not symmetric: which of the two averages matters."""
    _, first, second = pair
    with engine(first) as one, engine(second) as other:
        there = compare_text(one, other, TEXT, 50)[1]
        back = compare_text(other, one, TEXT, 50)[1]
    assert there.agreement == back.agreement
    assert there.mean_kl != pytest.approx(back.mean_kl, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 2), (13, 301), (5, 4099)])
def test_divergence_equals_torchs_own(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    reference, tested = (4 * torch.randn(shape, generator=generator) for _ in range(2))
    inputs, target = tested.double().log_softmax(-1), reference.double().softmax(-1)
    expected = torch.nn.functional.kl_div(inputs, target, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(reference, tested).double(), expected, rtol=1e-5, atol=1e-7)
    assert divergence(reference, reference).tolist() == [0] * shape[0]


def test_divergence_where_tokens_are_ruled_out() -> None:
    reference = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 1.0, 2.0]])
    tested = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 2.0]])
    assert divergence(reference, tested).tolist() == pytest.approx([math.log(3 / 2), math.inf])
    assert divergence(reference, reference).tolist() == [0, 0]


def test_parts_change_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = list(range(3, 90))
    with engine(tiny) as model:
        whole = model.core.logits(text)
        parts = list(model.core.logit_parts(text, 20))
        assert [len(part) for part in parts] == [20, 20, 20, 20, 7]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(scoring, "PART", 1)
        one_by_one = score_text(model, TEXT, 50).loss
        monkeypatch.setattr(scoring, "PART", 2**24)
        assert score_text(model, TEXT, 50).loss == pytest.approx(one_by_one, rel=1e-6)


def test_windows_are_those_that_both_can_hold(tiny: Path) -> None:
    with engine(tiny, max_length=20) as short, engine(tiny) as long:
        score, likeness = compare_text(long, short, TEXT, 100)
        assert score.loss == pytest.approx(score_text(short, TEXT, 100).loss)
    assert likeness.mean_kl == 0


def test_another_vocabulary_is_refused(tiny: Path, pair: tuple[str, Path, Path]) -> None:
    ours, theirs = (EngineConfig(model=str(folder), device="cpu") for folder in (tiny, pair[1]))
    with pytest.raises(ConfigError, match=r"301 tokens .* one of 277"):
        check_comparable(ours, theirs, CATALOG, TEXT)
    with engine(tiny) as tested, engine(pair[1]) as reference, pytest.raises(ConfigError, match="same tokenizer"):
        compare_text(tested, reference, TEXT, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"ac": 261', '"ac": 262').replace('"ad": 262', '"ad": 261'),
        lambda text: text.replace('"add_prefix_space": false', '"add_prefix_space": true'),
    ],
    ids=["names of ids", "where text is cut"],
)
def test_another_tokenizer_is_refused(tiny: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "tokenizer.json"
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before
    ours, theirs = (EngineConfig(model=str(folder), device="cpu") for folder in (tiny, tmp_path))
    with pytest.raises(ConfigError, match="different tokenizers"):
        check_comparable(ours, theirs, CATALOG, TEXT)


def test_two_engines_that_do_not_fit_are_refused_with_what_is_missing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scoring_config(EngineConfig(model=str(tiny), device="cpu"), CATALOG, 64)
    taken = ledger.make_plan(config, CATALOG, find_folder(config, CATALOG)).taken
    monkeypatch.setattr(ledger, "machine_bytes", lambda: 2 * taken)
    check_comparable(config, config, CATALOG, TEXT)
    monkeypatch.setattr(ledger, "machine_bytes", lambda: 2 * taken - 3)
    with pytest.raises(CapacityError, match=f"takes {taken:,} bytes .* 3 bytes more than there are"):
        check_comparable(config, config, CATALOG, TEXT)


def test_an_engine_that_only_scores_is_as_large_as_its_window(tiny: Path) -> None:
    config = EngineConfig(model=str(tiny), device="cpu", block_size=7)
    assert context(config, CATALOG) == 128
    assert scoring_config(config, CATALOG, 50).num_blocks == 8
    assert scoring_config(config, CATALOG, 10**9).num_blocks == 19
    assert scoring_config(config, CATALOG, -3).num_blocks == 1
    small = scoring_config(config, CATALOG, 50)
    with engine(tiny) as model, Engine(config=small) as scorer:
        assert score_text(scorer, TEXT, 50).loss == pytest.approx(score_text(model, TEXT, 50).loss)


def test_a_closed_engine_leaves_its_memory(tiny: Path) -> None:
    """Else the engines of a table would pile up beside the reference."""
    gc.disable()
    try:
        with engine(tiny) as model:
            score_text(model, TEXT, 50)
            weights = weakref.ref(model.core._ranks.rank.built.module)
            assert weights() is not None
        del model
        assert weights() is None
    finally:
        gc.enable()


def test_a_model_whose_logits_are_no_numbers_is_refused(pair: tuple[str, Path, Path]) -> None:
    with engine(pair[1]) as model:
        parts = model.core.logit_parts

        def damaged(ids: list[int], num_rows: int) -> Iterator[Tensor]:
            return (part * math.nan for part in parts(ids, num_rows))

        model.core.logit_parts = damaged  # type: ignore[method-assign, assignment]
        with pytest.raises(PlexorError, match="loss is nan"):
            score_text(model, TEXT, 50)


def test_a_loss_beyond_float64s_exponents_is_infinitely_perplexing() -> None:
    scores = [Score(5, 20, loss).perplexity for loss in (700.0, 709.0, 709.9, 1e6)]
    assert all(smaller <= larger for smaller, larger in pairwise(scores))
    assert scores[1] < math.inf == scores[2] == scores[3]


def test_too_short_a_text_is_refused(tiny: Path) -> None:
    with engine(tiny) as model, pytest.raises(RequestError):
        score_text(model, "", 16)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_windows_that_predict_nothing_are_refused(tiny: Path, window: int) -> None:
    with engine(tiny) as model, pytest.raises(RequestError, match=f"window has {window} tokens"):
        score_text(model, TEXT, window)


def test_a_window_beyond_the_cache_is_refused_with_both_numbers(tiny: Path) -> None:
    with engine(tiny, num_blocks=2) as model:
        with pytest.raises(ConfigError, match=r"50 .* 32"):
            score_text(model, TEXT, 50)
        assert score_text(model, TEXT, 32).num_tokens > 0
