"""The loader fills every place exactly once, or says in one sentence what is wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from plexor.checkpoint.loader import _Room, load_weights
from plexor.checkpoint.mapping import Ignore, Rule, WeightRule
from plexor.checkpoint.view import Transpose
from plexor.errors import CheckpointError
from plexor.extension.catalog import Catalog
from plexor.model.build import Build
from plexor.model.linear import GroupedLinear, Linear, Part
from plexor.model.norm import RMSNorm
from plexor.runtime.loading import Placement, make_build
from plexor.testing.source import MemorySource

RULES = (
    Rule("norm", "norm"),
    Rule("q", "qkv", part=0),
    Rule("k", "qkv", part=1),
    Rule("experts.{expert}.up", "up", group="expert"),
    Rule("down_stack", "down", stacked=True, tensor="weight", steps=(Transpose(),)),
    Ignore("cache.{layer}"),
)


class Small(nn.Module):
    """Each kind of place that a checkpoint can fill."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.norm = RMSNorm(build, 4, 1e-6)
        self.qkv = Linear(build, 4, (Part(3, 2), Part(1, 2)), cut="out", bias=True)
        self.up = GroupedLinear(build, 4, (Part(6),), groups=3)
        self.down = GroupedLinear(build, 6, (Part(4),), groups=3)


@pytest.fixture(scope="module")
def build() -> Build:
    catalog = Catalog.load(allow=frozenset())
    return make_build(catalog, catalog.kernel_table(), Placement(torch.device("cpu"), torch.float32))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "norm.weight": (4,),
        "q.weight": (6, 4),
        "q.bias": (6,),
        "k.weight": (2, 4),
        "k.bias": (2,),
        **{f"experts.{expert}.up.weight": (6, 4) for expert in range(3)},
        "down_stack": (3, 6, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def refused(build: Build, tensors: dict[str, Tensor], rules: tuple[WeightRule, ...] = RULES) -> str:
    """What is said, which does not depend on how many threads read."""
    said = set()
    for readers in (1, 3):
        with pytest.raises(CheckpointError) as caught:
            load_weights(Small(build), rules, MemorySource(tensors), readers=readers)
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop()


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_everything_lands_in_its_place(build: Build, tensors: dict[str, Tensor], readers: int) -> None:
    small = Small(build)
    told: list[tuple[int, int]] = []
    tensors["cache.7"] = torch.zeros(3)
    report = load_weights(
        small, RULES, MemorySource(tensors), lambda done, total: told.append((done, total)), readers=readers
    )
    assert torch.equal(small.norm.weight, tensors["norm.weight"])
    assert torch.equal(small.qkv.stored["weight"], torch.cat((tensors["q.weight"], tensors["k.weight"])))
    assert small.qkv.bias is not None
    assert torch.equal(small.qkv.bias, torch.cat((tensors["q.bias"], tensors["k.bias"])))
    experts = [tensors[f"experts.{expert}.up.weight"] for expert in range(3)]
    assert torch.equal(small.up.stored["weight"], torch.stack(experts))
    assert torch.equal(small.down.stored["weight"], tensors["down_stack"].mT)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (report.num_tensors, report.num_ignored, report.num_bytes) == (len(tensors) - 1, 1, total)
    assert report.dtypes == ("float32",)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_missing_tensor_is_named_before_any_is_read(build: Build, tensors: dict[str, Tensor]) -> None:
    del tensors["k.bias"], tensors["experts.1.up.weight"]
    source = MemorySource(tensors)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .*\(k\.bias, experts\.1\.up\.weight\)"):
        load_weights(Small(build), RULES, source)
    assert source.reads == []


def test_many_missing_tensors_are_counted(build: Build) -> None:
    assert "lacks 9 tensors" in (said := refused(build, {}))
    assert "and 4 more" in said


@pytest.mark.parametrize("name", ["stranger", "q.scale", "experts.3.up.weight", "norm.bias"])
def test_a_tensor_without_a_place_is_named(build: Build, tensors: dict[str, Tensor], name: str) -> None:
    assert f"has 1 that have no place in it ({name})" in refused(build, tensors | {name: torch.zeros(2)})


def test_missing_and_surplus_are_said_together(build: Build, tensors: dict[str, Tensor]) -> None:
    tensors["query.weight"] = tensors.pop("q.weight")
    said = refused(build, tensors)
    assert "q.weight" in said
    assert "query.weight" in said


def test_two_tensors_for_one_place_are_refused(build: Build, tensors: dict[str, Tensor]) -> None:
    said = refused(build, tensors | {"old.q.weight": torch.zeros(6, 4)}, (*RULES, Rule("old.q", "qkv")))
    assert "'old.q.weight'" in said
    assert "'q.weight'" in said


@pytest.mark.parametrize(
    ("name", "shape"),
    [("norm.weight", (5,)), ("q.weight", (4, 6)), ("k.bias", (3,)), ("down_stack", (3, 4, 6))],
)
def test_a_misshaped_tensor_is_named_with_both_shapes(
    build: Build, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> None:
    said = refused(build, tensors | {name: torch.zeros(shape)})
    assert f"'{name}'" in said
    assert "where the model needs [" in said


def test_too_many_groups_in_a_stack_are_refused(build: Build, tensors: dict[str, Tensor]) -> None:
    assert "down_stack" in refused(build, tensors | {"down_stack": torch.zeros(4, 6, 4)})
    assert "down_stack" in refused(build, tensors | {"down_stack": torch.zeros(2, 6, 4)})
    assert "single number" in refused(build, tensors | {"down_stack": torch.tensor(1.0)})


def test_nan_is_refused_with_the_tensors_name(build: Build, tensors: dict[str, Tensor]) -> None:
    tensors["experts.2.up.weight"][1, 1] = float("nan")
    assert "experts.2.up.weight" in refused(build, tensors)


def test_of_several_bad_tensors_the_first_on_disk_is_named(build: Build, tensors: dict[str, Tensor]) -> None:
    tensors["k.weight"][0, 0] = tensors["experts.0.up.weight"][1, 1] = float("inf")
    assert "k.weight" in refused(build, tensors)


def test_no_tensor_is_read_after_one_was_refused(build: Build, tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"][0] = float("nan")
    source = MemorySource(tensors)
    with pytest.raises(CheckpointError, match="norm"):
        load_weights(Small(build), RULES, source)
    assert [name for name, _ in source.reads] == ["norm.weight"]


def test_threads_end_when_progress_fails(build: Build, tensors: dict[str, Tensor]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        load_weights(Small(build), RULES, MemorySource(tensors), stop, readers=3)
    assert threading.active_count() == before


def test_room_lets_in_what_fits_and_the_largest_alone() -> None:
    room, counting, inside = _Room(10), threading.Lock(), [0]

    def stay(size: int) -> None:
        with room.taken(size):
            with counting:
                inside[0] += size
                assert inside[0] <= 10 or inside == [size]
            with counting:
                inside[0] -= size

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(stay, (3, 4, 25, 3, 10, 2, 2, 2, 2, 2, 9, 1) * 20))
    assert inside == [0]


def test_room_is_shared() -> None:
    room, all_inside = _Room(10), threading.Barrier(5, timeout=20)

    def meet(size: int) -> None:
        with room.taken(size):
            all_inside.wait()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(meet, [2] * 5))


def test_integers_are_not_taken_for_weights(build: Build, tensors: dict[str, Tensor]) -> None:
    said = refused(build, tensors | {"q.weight": torch.ones(6, 4, dtype=torch.int8)})
    assert "'q.weight'" in said
    assert "int8" in said


def test_values_beyond_the_models_dtype_are_refused(tensors: dict[str, Tensor]) -> None:
    catalog = Catalog.load(allow=frozenset())
    build = make_build(catalog, catalog.kernel_table(), Placement(torch.device("cpu"), torch.float16))
    load_weights(Small(build), RULES, MemorySource(tensors))
    for name in ("q.weight", "q.bias", "norm.weight"):
        wide = tensors[name].clone()
        wide[0] = 1e6
        said = refused(build, tensors | {name: wide})
        assert f"'{name}'" in said
        assert "float16" in said
