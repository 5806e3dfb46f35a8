"""Reads tensors lazily from safetensors files whose every header byte was checked first.

The file format is https://github.com/huggingface/safetensors#format: eight bytes little-endian length, a JSON header,
then the tensors' bytes without gaps. Bytes are read with `pread` into fresh memory rather than mapped: a mapping of
the whole file would count towards the peak memory and would kill the process if the file shrank meanwhile.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

import torch
from torch import Tensor

from plexor.checkpoint.document import parse_object, quote, read_object
from plexor.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_SIZE: Final = 2**63 - 1
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_FINITE_CHUNK: Final = 1 << 22  # stays in a CPU's cache, and takes little memory where numbers are widened
_FINITE_CHUNK_ON_DEVICE: Final = 1 << 28  # few launches
_DAMAGED: Final = "the file is damaged, download it again."
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; num_bytes is its size in `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


class TensorSource(Protocol):
    """Named tensors that are read one at a time; what a CheckpointFormat's `open` target returns.

    Several threads may read at once.
    """

    def names(self) -> tuple[str, ...]:
        """Every tensor in the order in which it lies on disk, so that reading in this order streams."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor without reading it; CheckpointError if there is none of that name."""
        ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A contiguous tensor of its own memory that holds `whole[index]`; only those bytes are read.

        index: one slice for each leading axis, without steps; axes that are not named are read whole.
        """
        ...

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        """Fills `target` with bytes of what `read` gives, row by row, from byte `start` of it on."""
        ...

    def close(self) -> None:
        """Lets go of the files; tensors that were read stay valid."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor and where it starts, counted in bytes from the beginning of its file."""

    info: TensorInfo
    start: int


class SafetensorsSource:
    """The tensors of a folder with `model.safetensors`, or with an index and the shards that it names.

    All headers are read and checked when it is made; CheckpointError names the file and tensor at fault.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._places: dict[str, _Place] = {}
        shards = _shards(folder)
        with ExitStack() as stack:
            for path, expected in shards.items():
                file = stack.enter_context(_open(path))
                self._files[path] = file
                places = _places(path, file)
                _check_against_index(path, {place.info.name for place in places}, expected)
                for place in places:
                    self._add(place)
            self._stack = stack.pop_all()

    def _add(self, place: _Place) -> None:
        name = place.info.name
        if name in self._places:
            raise CheckpointError(
                f"Tensor {quote(name)} lies both in {self._places[name].info.file} and in {place.info.file}; "
                "remove one of them and rebuild the index."
            )
        self._places[name] = place

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def info(self, name: str) -> TensorInfo:
        return self._place(name).info

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        info = self.info(name)
        whole = torch.empty(cut_shape(info.shape, index), dtype=info.dtype)
        self.read_into(whole.reshape(-1).view(torch.uint8).numpy().data, name, index)
        return whole

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        place = self._place(name)
        filled = 0
        for offset, size in _runs(place.info.shape, _spans(place.info.shape, index), place.info.dtype.itemsize, start):
            if filled == len(target):
                break
            part = target[filled : filled + size]
            self._fill(part, place, offset)
            filled += len(part)
        assert filled == len(target), f"{len(target)} bytes asked from byte {start} of a part that ends before"

    def _fill(self, target: memoryview, place: _Place, offset: int) -> None:
        """Reads bytes that start `offset` bytes into a tensor; one call of the system may deliver fewer than asked."""
        descriptor = self._files[place.info.file].fileno()
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], place.start + offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{place.info.file} ends within tensor {quote(place.info.name)}, although it was long enough when "
                    "it was opened; let nothing write to the checkpoint while it is loaded."
                )
            done += count

    def _place(self, name: str) -> _Place:
        if name in self._places:
            return self._places[name]
        near = get_close_matches(name, self._places, n=1)
        hint = (
            f"did you mean {quote(near[0])}?" if near else "check that the checkpoint is of the architecture it claims."
        )
        files = ", ".join(str(path) for path in itertools.islice(self._files, 3)) + (
            ", ..." if len(self._files) > 3 else ""
        )
        raise CheckpointError(f"No tensor {quote(name)} among the {len(self._places)} in {files}; {hint}")

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def detects(folder: Path) -> bool:
    """Whether a folder holds safetensors under the names that this format knows."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def open_source(folder: Path) -> SafetensorsSource:
    """Opens a folder's tensors; where it has none in this format, the CheckpointError says what to do instead."""
    return SafetensorsSource(folder)


def cut_shape(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of what an index, as `TensorSource.read` takes it, selects of a tensor."""
    return tuple(stop - start for start, stop in _spans(shape, index))


def check_finite(tensor: Tensor, info: TensorInfo) -> None:
    """Raises CheckpointError naming file and tensor if what was read of it holds NaN or an infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    is_small = values.device.type == "cpu" or values.dtype.itemsize == 1
    chunk = _FINITE_CHUNK if is_small else _FINITE_CHUNK_ON_DEVICE
    pieces = torch.split(values.reshape(-1), chunk)
    if all(_is_finite(_widen(piece)) for piece in pieces):
        return
    num_bad = sum(int((~torch.isfinite(_widen(piece))).sum()) for piece in pieces)
    raise CheckpointError(
        f"Tensor {quote(info.name)} in {info.file} holds NaN or infinity in {num_bad} of {values.numel()} values; "
        "the weights are unusable, download the file again or ask its publisher."
    )


def _is_finite(piece: Tensor) -> bool:
    """One pass over the memory, because the extremes of a tensor are NaN as soon as one value is."""
    if piece.numel() == 0:
        return True
    lowest, highest = torch.aminmax(piece)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _widen(piece: Tensor) -> Tensor:
    """One-byte floats as float32, because torch cannot compare them."""
    return piece.to(torch.float32) if piece.dtype.itemsize == 1 else piece


def _shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files to open in order, each with the tensors that the index promises in it, or None without an index."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.is_file():
        if not single.is_file():
            raise _absence(folder)
        return {single: None}
    promised = _read_index(index)
    if single.is_file() and single not in promised:
        raise CheckpointError(
            f"{folder} holds {SINGLE_FILE} and also {INDEX_FILE}, which names other files; "
            "remove the one that is not the model."
        )
    return {path: frozenset(promised[path]) for path in sorted(promised)}


def _absence(folder: Path) -> CheckpointError:
    """Why a folder without this format's files cannot be read, from what lies there instead."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if tensors:
        return CheckpointError(
            f"{folder} holds {len(tensors)} safetensors files ({tensors[0]}, ...) but neither {SINGLE_FILE} nor "
            f"{INDEX_FILE}, so it is not known which belong to the model; rename the only one or add the index."
        )
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights only as pickle files ({pickles[0]}), which can run code when they are read; "
            "convert to safetensors (save_pretrained of transformers writes them) and try again."
        )
    return CheckpointError(
        f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there; finish the download."
    )


def _read_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" object that says which file holds which tensor; {_DAMAGED}')
    promised: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        path = index.parent / _shard_name(index, name, file)
        promised.setdefault(path, set()).add(name)
    for path, names in promised.items():
        if not path.is_file():
            raise CheckpointError(
                f"{index} says that tensor {quote(min(names))} lies in {path.name}, which is not in {index.parent}; "
                "finish the download."
            )
    return promised


def _shard_name(index: Path, name: str, file: Any) -> str:
    """A file's name from an index if it stays inside the folder; an index must not make us read what it likes."""
    if not isinstance(file, str):
        raise CheckpointError(
            f"{index} gives {quote(repr(file))} as the file of tensor {quote(name)}, not a name; {_DAMAGED}"
        )
    if "/" in file or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{index} sends tensor {quote(name)} to {quote(file)}, which may lead out of the folder; "
            "files must lie beside the index, so do not trust this checkpoint."
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{index} sends tensor {quote(name)} to {quote(file)}, which is no .safetensors file; "
            "convert it to safetensors."
        )
    return file


def _check_against_index(path: Path, found: set[str], promised: frozenset[str] | None) -> None:
    if promised is None:
        return
    missing, surplus = promised - found, found - promised
    if missing:
        raise CheckpointError(
            f"{INDEX_FILE} promises tensor {quote(min(missing))} in {path}, which does not hold it "
            f"({len(missing)} missing in all); download both again."
        )
    if surplus:
        raise CheckpointError(
            f"{path} holds tensor {quote(min(surplus))}, which {INDEX_FILE} does not place there "
            f"({len(surplus)} such in all); download both again."
        )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); check that you may read it.") from error


def _places(path: Path, file: BinaryIO) -> list[_Place]:
    """Every tensor of one file by ascending offset, after the header was found sound."""
    header, data_start, data_bytes = _read_header(path, file)
    _check_metadata(path, header.pop("__metadata__", {}))
    places = [_parse_entry(path, name, entry, data_start, data_bytes) for name, entry in header.items()]
    places.sort(key=lambda place: (place.start, place.start + place.info.num_bytes))
    _check_cover(path, places, data_start, data_bytes)
    return places


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors' bytes start and how many there are."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} is {file_bytes} bytes long, too short for a safetensors file; finish the download."
        )
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(
            f"{path} claims a header of {header_bytes} bytes, but the file is {file_bytes} bytes long and headers may "
            f"be {_MAX_HEADER_BYTES} at most; it is truncated or no safetensors file, download it again."
        )
    content = file.read(header_bytes)
    if len(content) != header_bytes:
        raise CheckpointError(f"{path} gave {len(content)} of its header's {header_bytes} bytes; {_DAMAGED}")
    return parse_object(content, f"The header of {path}"), 8 + header_bytes, file_bytes - 8 - header_bytes


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The header of {path} has a __metadata__ that is no object of strings; {_DAMAGED}")


def _parse_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> _Place:
    what = f"Tensor {quote(name)} in {path}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} is not described by exactly dtype, shape and data_offsets; {_DAMAGED}")
    dtype = _parse_dtype(what, entry["dtype"])
    shape = _parse_shape(what, entry["shape"])
    begin, end = _parse_offsets(what, entry["data_offsets"])
    if end > data_bytes:
        raise CheckpointError(
            f"{what} ends at byte {end} of the data, but the file holds only {data_bytes}; it is truncated, "
            "download it again."
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != end - begin:
        raise CheckpointError(
            f"{what} needs {num_bytes} bytes for {list(shape)} of {entry['dtype']}, but its offsets {begin} to {end} "
            f"span {end - begin}; {_DAMAGED}"
        )
    return _Place(TensorInfo(name, path, dtype, shape, num_bytes), data_start + begin)


def _parse_dtype(what: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{what} has dtype {quote(str(dtype))}, which cannot be read; convert it to one of {', '.join(DTYPES)}."
        )
    return DTYPES[dtype]


def _parse_shape(what: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise CheckpointError(
            f"{what} has shape {quote(str(shape))}, which is no list of sizes from 0 to 2^63 - 1; {_DAMAGED}"
        )
    if math.prod(max(size, 1) for size in shape) > _MAX_SIZE:
        raise CheckpointError(f"{what} has shape {quote(str(shape))}, more elements than 2^63 - 1; {_DAMAGED}")
    return tuple(shape)


def _parse_offsets(what: str, offsets: Any) -> tuple[int, int]:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise CheckpointError(
            f"{what} has data_offsets {quote(str(offsets))}, which are not two byte counts; {_DAMAGED}"
        )
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{what} starts at byte {begin} of the data, after its end at byte {end}; {_DAMAGED}")
    return begin, end


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _check_cover(path: Path, places: list[_Place], data_start: int, data_bytes: int) -> None:
    """Each byte of the data must belong to exactly one tensor, or the file says something else than was written."""
    position, before = 0, "the start of the data"
    for place in places:
        begin, name = place.start - data_start, quote(place.info.name)
        if begin < position:
            raise CheckpointError(
                f"Tensor {name} in {path} starts at byte {begin} of the data and so overlaps {before}, which ends at "
                f"byte {position}; {_DAMAGED}"
            )
        if begin > position:
            raise CheckpointError(
                f"Tensor {name} in {path} starts at byte {begin} of the data, which leaves a hole of "
                f"{begin - position} bytes after {before}; {_DAMAGED}"
            )
        position, before = begin + place.info.num_bytes, f"tensor {name}"
    if position != data_bytes:
        raise CheckpointError(
            f"{path} has {data_bytes - position} trailing bytes after {before}, which belong to no tensor; {_DAMAGED}"
        )


def _spans(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """The (start, stop) that an index selects of each axis."""
    assert len(index) <= len(shape), f"{len(index)} slices for {len(shape)} axes"
    whole = (slice(None),) * (len(shape) - len(index))
    spans = []
    for size, part in zip(shape, index + whole, strict=True):
        start, stop, step = part.indices(size)
        assert step == 1, "slices of a stored tensor have no step"
        spans.append((start, max(start, stop)))
    return spans


def _runs(shape: tuple[int, ...], spans: list[tuple[int, int]], itemsize: int, skip: int) -> Iterator[tuple[int, int]]:
    """(offset, size) in bytes of each unbroken stretch of the selection, in row-major order, without its first bytes.

    Axes behind the last one that is cut are whole, so the stretch covers them:

        shape [4, 6], rows 1:3, columns 2:5      . . . . . .
                                                 . . # # # .    two stretches of 3 elements
                                                 . . # # # .
                                                 . . . . . .
    """
    cut = max((axis for axis, (start, stop) in enumerate(spans) if stop - start != shape[axis]), default=0)
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    if not shape:
        yield skip, itemsize - skip
        return
    start, stop = spans[cut]
    size = (stop - start) * strides[cut]
    if size == 0:
        return
    whole, skip = divmod(skip, size)
    rows_before_cut = itertools.product(*(range(first, last) for first, last in spans[:cut]))
    for rows in itertools.islice(rows_before_cut, whole, None):
        offset = sum(row * stride for row, stride in zip(rows, strides, strict=False))
        yield offset + start * strides[cut] + skip, size - skip
        skip = 0
