"""Hostile and honest safetensors: what is damaged is refused by file and tensor, what is sound reads back exactly."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor.checkpoint.source import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    check_finite,
    detects,
    open_source,
)
from plexor.errors import CheckpointError

F32_2x3 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: str | bytes | dict[str, Any], data: bytes = b"") -> Path:
    """A safetensors file with any header, however wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def refusal(folder: Path, *parts: str) -> str:
    """The one-sentence message with which a folder is refused, after checking that it names these parts."""
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def entry(**changes: Any) -> dict[str, Any]:
    return {"here": F32_2x3 | changes}


HOSTILE_ENTRIES: list[tuple[str, Any, int, str]] = [
    ("unknown dtype", entry(dtype="F4"), 24, "dtype 'F4'"),
    ("dtype of another type", entry(dtype=7), 24, "dtype '7'"),
    ("negative size", entry(shape=[-2, -3]), 24, "shape '[-2, -3]'"),
    ("size that is a truth value", entry(shape=[True, 6]), 24, "shape '[True, 6]'"),
    ("size that is a float", entry(shape=[2.0, 3]), 24, "shape '[2.0, 3]'"),
    ("shape that is a number", entry(shape=6), 24, "shape '6'"),
    ("size above 64 bits", entry(shape=[2**64 + 6]), 24, "shape '[18446744073709551622]'"),
    ("product that wraps to the right size", entry(shape=[2**32, 2**32 + 1, 6]), 24, "more elements than"),
    ("overflow hidden by a zero", entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), 0, "more elements than"),
    ("more bytes than the shape", entry(data_offsets=[0, 28]), 28, "needs 24 bytes"),
    ("fewer bytes than the shape", entry(shape=[3, 3]), 24, "needs 36 bytes"),
    ("end before the start", entry(data_offsets=[24, 0]), 24, "starts at byte 24 of the data, after its end at byte 0"),
    ("negative offset", entry(data_offsets=[-24, 0]), 24, "data_offsets '[-24, 0]'"),
    ("one offset", entry(data_offsets=[24]), 24, "data_offsets '[24]'"),
    ("offset past the file", entry(data_offsets=[2**62, 2**62 + 24]), 24, "holds only 24"),
    ("truncated data", entry(), 23, "holds only 23"),
    ("missing key", {"here": {"dtype": "F32", "shape": [2, 3]}}, 24, "exactly dtype, shape and data_offsets"),
    ("surplus key", entry(strides=[1, 2]), 24, "exactly dtype, shape and data_offsets"),
    ("entry that is a list", {"here": [1]}, 24, "exactly dtype, shape and data_offsets"),
    ("hole at the start", entry(data_offsets=[4, 28]), 28, "hole of 4 bytes after the start"),
    (
        "overlap",
        entry() | {"there": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}},
        24,
        "'there' in",
    ),
    (
        "overlap by the same bytes",
        entry() | {"there": F32_2x3},
        24,
        "overlaps tensor 'here', which ends at byte 24",
    ),
    (
        "empty tensor inside another",
        entry() | {"there": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}},
        24,
        "overlaps tensor 'here'",
    ),
    (
        "hole between two",
        entry() | {"there": {"dtype": "I8", "shape": [1], "data_offsets": [25, 26]}},
        26,
        "hole of 1 bytes after tensor 'here'",
    ),
    ("trailing bytes", entry(), 27, "3 trailing bytes after tensor 'here'"),
]


@pytest.mark.parametrize(
    ("header", "num_bytes", "reason"), [case[1:] for case in HOSTILE_ENTRIES], ids=[case[0] for case in HOSTILE_ENTRIES]
)
def test_hostile_entry_is_refused_by_file_and_tensor(
    tmp_path: Path, header: dict[str, Any], num_bytes: int, reason: str
) -> None:
    path = write(tmp_path / SINGLE_FILE, header, bytes(num_bytes))
    refusal(tmp_path, str(path), "'here'", reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes long, too short"),
        (b"\x08\x00\x00", "3 bytes long, too short"),
        (struct.pack("<Q", 2**62) + b"{}", f"header of {2**62} bytes, but the file is 10 bytes long"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes"),
        (struct.pack("<Q", 2) + b"[]", "JSON list where an object is expected"),
        (struct.pack("<Q", 0), "not valid JSON"),
        (struct.pack("<Q", 6) + b'{"a":1', "not valid JSON"),
        (struct.pack("<Q", 4) + b'{"\xff"', "not UTF-8 text (byte 2 of 4"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{a}}', "not valid JSON"),
        (b"PK\x03\x04" + b"\x00\x00\x08\x08" + bytes(100), "claims a header of"),
    ],
)
def test_hostile_header_is_refused_by_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / SINGLE_FILE
    path.write_bytes(content)
    refusal(tmp_path, str(path), reason)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 100_000_100)  # sparse: takes no room on disk
    refusal(tmp_path, str(path), "header of 100000001 bytes", "100000000 at most")


def test_tensor_named_twice_in_a_header(tmp_path: Path) -> None:
    one = json.dumps(F32_2x3)
    path = write(tmp_path / SINGLE_FILE, f'{{"here": {one}, "here": {one}}}', bytes(24))
    refusal(tmp_path, str(path), "names 'here' twice")


def test_deeply_nested_header(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE_FILE, '{"here":' * 100_000 + "1" + "}" * 100_000)
    refusal(tmp_path, str(path), "nested too deeply")


def test_number_with_thousands_of_digits(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE_FILE, '{"here": ' + "9" * 5000 + "}")
    refusal(tmp_path, str(path), "number that cannot be read")


def test_metadata_must_be_strings(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE_FILE, {"__metadata__": {"format": 7}} | entry(), bytes(24))
    refusal(tmp_path, str(path), "__metadata__")


def test_name_with_control_characters_stays_on_one_line(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_FILE, {"a\n\x1b[31m" + "b" * 9000: F32_2x3}, bytes(23))
    message = refusal(tmp_path, r"'a\n\x1b[31m", "9007 characters")
    assert len(message) < 1000


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x\0.safetensors"]
)
def test_index_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"here": name})
    refusal(tmp_path, INDEX_FILE, "'here'", repr(name), "out of the folder")


@pytest.mark.parametrize("name", ["weights.bin", "..", "", ".", "x.safetensors.pt"])
def test_index_that_names_another_kind_of_file(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"here": name})
    refusal(tmp_path, INDEX_FILE, "'here'", repr(name), "no .safetensors file")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    refusal(tmp_path, INDEX_FILE, "weight_map")


def test_index_with_a_number_for_a_file(tmp_path: Path) -> None:
    write_index(tmp_path, {"here": 3})
    refusal(tmp_path, INDEX_FILE, "'here'", "'3'")


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"here": "a.safetensors", "here": "b.safetensors"}}')
    refusal(tmp_path, INDEX_FILE, "names 'here' twice")


def test_index_with_a_missing_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refusal(tmp_path, INDEX_FILE, "'b'", "two.safetensors", "finish the download")


def test_index_that_promises_more_than_the_shard_holds(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    refusal(tmp_path, INDEX_FILE, "'b'", "one.safetensors", "1 missing")


def test_shard_with_a_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors"})
    refusal(tmp_path, INDEX_FILE, "'b'", "one.safetensors")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refusal(tmp_path, "one.safetensors", "'b'")


def test_single_file_beside_an_index_of_others(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    write_index(tmp_path, {"a": "one.safetensors"})
    refusal(tmp_path, SINGLE_FILE, INDEX_FILE, "remove the one")


def test_index_of_the_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / SINGLE_FILE)
    write_index(tmp_path, {"a": SINGLE_FILE})
    with open_source(tmp_path) as source:
        assert source.read("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("pytorch_model.bin", "convert to safetensors"),
        ("consolidated.00.pth", "convert to safetensors"),
        ("adapter.safetensors", "add the index"),
        ("README.md", "finish the download"),
    ],
)
def test_folder_without_the_expected_files_says_what_to_do(tmp_path: Path, file: str, reason: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    assert not detects(tmp_path)
    refusal(tmp_path, str(tmp_path), reason)


def test_link_to_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "gone")
    assert not detects(tmp_path)
    refusal(tmp_path, "finish the download")


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.ones(100)}, path)
    with open_source(tmp_path) as source:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match=r"model\.safetensors ends within tensor 'a'"):
            source.read("a")


def test_unknown_tensor_gets_a_suggestion(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / SINGLE_FILE)
    with open_source(tmp_path) as source:
        with pytest.raises(CheckpointError, match=r"'lm_head.wieght'.*did you mean 'lm_head.weight'\?"):
            source.read("lm_head.wieght")
        with pytest.raises(CheckpointError, match="No tensor 'other' among the 1"):
            source.info("other")


def test_failed_opening_closes_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    before = set(os.listdir("/proc/self/fd"))
    refusal(tmp_path, "two.safetensors")
    assert set(os.listdir("/proc/self/fd")) == before


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, generator=generator)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]
    tensors = {str(dtype): values.to(dtype) for dtype in dtypes}
    tensors |= {str(dtype): (values * 100).abs().to(dtype) for dtype in integers}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "empty inside": torch.empty(3, 0, 2),
        "complex": torch.view_as_complex(values[:, :2].contiguous()),
    }


def test_every_dtype_reads_back(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / SINGLE_FILE)
    expected = load_file(tmp_path / SINGLE_FILE)
    with open_source(tmp_path) as source:
        assert set(source.names()) == set(tensors)
        for name in source.names():
            found, info = source.read(name), source.info(name)
            assert (found.dtype, tuple(found.shape)) == (tensors[name].dtype, info.shape)
            assert info.dtype == found.dtype
            assert info.num_bytes == found.numel() * found.itemsize
            assert found.flatten().tolist() == expected[name].flatten().tolist()


def test_exponent_only_dtype_reads_back(tmp_path: Path) -> None:
    write(
        tmp_path / SINGLE_FILE, {"scale": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [0, 3]}}, b"\x7e\x7f\x80"
    )
    with open_source(tmp_path) as source:
        assert source.read("scale").to(torch.float32).tolist() == [0.5, 1.0, 2.0]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    bound = st.none() | st.integers(-6, 6)
    num_slices = draw(st.integers(0, len(shape)))
    return shape, tuple(slice(draw(bound), draw(bound)) for _ in range(num_slices))


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_slices_equal_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: tuple[tuple[int, ...], tuple[slice, ...]]
) -> None:
    shape, index = cut
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    save_file({"before": torch.ones(3), "whole": whole, "after": torch.ones(3)}, folder / SINGLE_FILE)
    with open_source(folder) as source:
        found = source.read("whole", index)
    assert found.is_contiguous()
    assert torch.equal(found, load_file(folder / SINGLE_FILE)["whole"][index])


def test_only_the_asked_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.arange(100.0).reshape(10, 10)}, path)
    with open_source(tmp_path) as source:
        os.truncate(path, path.stat().st_size - 10 * 4)  # the last row is gone, the others still read
        assert source.read("a", (slice(8, 9),)).tolist() == [list(range(80, 90))]
        assert source.read("a", (slice(0, 9), slice(3, 4))).flatten().tolist() == list(range(3, 93, 10))
        with pytest.raises(CheckpointError, match="'a'"):
            source.read("a", (slice(9, 10),))


def test_what_was_read_is_its_own_memory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / SINGLE_FILE)
    with open_source(tmp_path) as source:
        source.read("a").fill_(7)
        kept = source.read("a")
    assert kept.tolist() == [0, 0, 0, 0]


def test_names_follow_the_files_and_the_offsets(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "m": {"dtype": "I8", "shape": [0], "data_offsets": [3, 3]},
        "a": {"dtype": "I8", "shape": [2], "data_offsets": [1, 3]},
    }
    write(tmp_path / "model-00002-of-00002.safetensors", header, b"\x01\x02\x03")
    save_file({"y": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(header, "model-00002-of-00002.safetensors") | {"y": "model-00001-of-00002.safetensors"}
    write_index(tmp_path, weight_map)
    source: TensorSource = open_source(tmp_path)
    assert source.names() == ("y", "z", "a", "m")
    assert source.read("a").tolist() == [2, 3]
    source.close()


def test_shards_reached_through_links_are_read(tmp_path: Path) -> None:
    """A download cache keeps the files elsewhere and links to them."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    save_file({"a": torch.arange(3)}, blobs / "0123")
    (folder / SINGLE_FILE).symlink_to(blobs / "0123")
    assert detects(folder)
    with SafetensorsSource(folder) as source:
        assert source.read("a").tolist() == [0, 1, 2]


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo("layer.weight", Path("x/model.safetensors"), tensor.dtype, tuple(tensor.shape), tensor.nbytes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_value_that_is_not_finite_is_refused(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(3, 5).to(dtype)
    check_finite(tensor, info_of(tensor))
    values = torch.ones(3, 5)
    values[1, 2] = values[2, 4] = bad
    tensor = values.to(dtype)
    with pytest.raises(CheckpointError, match=r"'layer.weight' in x/model.safetensors .* 2 of 15 values"):
        check_finite(tensor, info_of(tensor))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64])
def test_nan_of_dtypes_without_infinity_or_with_two_parts(dtype: torch.dtype) -> None:
    fine = torch.ones(4).to(dtype)
    check_finite(fine, info_of(fine))
    wrong = torch.tensor([1.0, float("nan")]).to(dtype)
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 of"):
        check_finite(wrong, info_of(wrong))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([torch.finfo(torch.float64).max, -torch.finfo(torch.float64).max], dtype=torch.float64),
        torch.tensor([2**31 - 1], dtype=torch.int32),
        torch.empty(0),
        torch.tensor(1.0),
        torch.ones(4, 6).t(),
    ],
)
def test_finite_values_pass(tensor: Tensor) -> None:
    check_finite(tensor, info_of(tensor))
