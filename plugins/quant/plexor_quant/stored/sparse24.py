"""The layout "sparse-24-bitmask" of the library compressed-tensors: 2:4 weights as kept numbers and a mask.

module.compressed   [out, in / 2] in any dtype, the two kept numbers of each four in their order
module.bitmask      uint8 [out, ceil(in / 8)], bit 0 of byte 0 for the first input feature: whether it is kept
module.shape        out and in
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plexor.api import CheckpointError, Grid, LinearFormat, TensorInfo, TensorSource
from plexor_quant.sparse24 import Sparse24Format
from plexor_quant.sparse24_layout import GROUP

BITMASK = "sparse-24-bitmask"
LAYOUTS = (BITMASK, "dense")
HALVES = (torch.bfloat16, torch.float16)
PRECISIONS: Mapping[str, str] = {"dense": "sparse24", "fp8": "sparse24_fp8"}
"""The precision of 2:4 weights for that of the same weights with their zeros."""


def is_sparse(quantization: Mapping[str, Any]) -> bool:
    """Whether weights are stored so; CheckpointError for another sparse layout than dense weights with zeros."""
    sparsity = quantization.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or not sparsity:
        return False
    if sparsity.get("format", "dense") not in LAYOUTS:
        raise CheckpointError(
            f"the weights are stored in the sparse format {sparsity['format']!r}, of which {' and '.join(LAYOUTS)} are "
            "read: use a checkpoint in one of these"
        )
    return sparsity.get("format") == BITMASK


class BitmaskSource:
    """A FormatSource: another source with a dense `weight` [out, in] in place of each that is stored so."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._sizes: dict[str, tuple[int, int]] = {}
        stored = frozenset(source.names())
        for name in source.names():
            module, _, last = name.rpartition(".")
            if last == "bitmask":
                self._sizes[module] = _sizes(source, stored, module)
        replaced = {f"{module}.{part}" for module in self._sizes for part in ("bitmask", "shape")}
        shown = {f"{module}.compressed": f"{module}.weight" for module in self._sizes}
        self._names = tuple(shown.get(name, name) for name in source.names() if name not in replaced)

    def names(self) -> tuple[str, ...]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        module = self._module(name)
        if module is None:
            return self._source.info(name)
        kept = self._source.info(f"{module}.compressed")
        num_bytes = kept.num_bytes + self._source.info(f"{module}.bitmask").num_bytes
        return TensorInfo(name, kept.file, kept.dtype, self._sizes[module], num_bytes)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        module = self._module(name)
        if module is None:
            return self._source.read(name, index)
        return self._dense(module, *self._cut(module, index))

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        if self._module(name) is None:
            self._source.read_into(target, name, index, start)
            return
        content = self.read(name, index).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        target[:] = content[start : start + len(target)]

    def grid(self, name: str, index: tuple[slice, ...] = ()) -> Grid | None:
        """None: these weights are not rounded, or by scales that this source knows nothing of."""
        return None

    def formats(self, name: str, index: tuple[slice, ...] = ()) -> tuple[LinearFormat, ...]:
        module = self._module(name)
        if module is None or self.info(name).dtype not in HALVES:
            return ()
        _, columns = self._cut(module, index)
        return (Sparse24Format(),) if columns.start % GROUP == columns.stop % GROUP == 0 else ()

    def is_kept(self, name: str) -> bool:
        """Whether a tensor that is shown is stored so."""
        return self._module(name) is not None

    def close(self) -> None:
        self._source.close()

    def _module(self, name: str) -> str | None:
        module, _, last = name.rpartition(".")
        return module if last == "weight" and module in self._sizes else None

    def _cut(self, module: str, index: tuple[slice, ...]) -> tuple[range, range]:
        whole = (*index, *(slice(None),) * (2 - len(index)))
        rows, columns = (range(size)[part] for size, part in zip(self._sizes[module], whole, strict=True))
        return rows, columns

    def _dense(self, module: str, rows: range, columns: range) -> Tensor:
        """Whole bytes of the mask are read, eight columns, and cut afterwards."""
        span = slice(rows.start, rows.stop)
        first, last = columns.start // 8, -(-columns.stop // 8)
        width = min(8 * last, self._sizes[module][1]) - 8 * first
        mask = self._mask(module, span, slice(first, last))[:, :width]
        kept = self._source.read(f"{module}.compressed", (span, slice(4 * first, 4 * first + width // 2)))
        bits = kept.contiguous().view(torch.uint8 if kept.element_size() == 1 else torch.int16)
        dense = torch.zeros(mask.shape, dtype=bits.dtype, device=bits.device).masked_scatter_(mask, bits)
        found: Tensor = dense.view(kept.dtype)[:, columns.start - 8 * first : columns.stop - 8 * first]
        return found

    def _mask(self, module: str, rows: slice, parts: slice) -> Tensor:
        name = f"{module}.bitmask"
        stored = self._source.read(name, (rows, parts))
        places = torch.arange(8, dtype=torch.uint8, device=stored.device)
        mask = (stored.unsqueeze(-1) >> places & 1).bool().flatten(-2)
        inside = mask[:, : self._sizes[module][1] - 8 * parts.start]
        if not bool((inside.unflatten(-1, (-1, GROUP)).sum(dim=-1) == 2).all()):
            raise CheckpointError(
                f"tensor {name!r} of {self._source.info(name).file} does not keep two numbers of every {GROUP}, as 2:4 "
                "weights do: the file is damaged, download it again"
            )
        return inside


def _sizes(source: TensorSource, names: frozenset[str], module: str) -> tuple[int, int]:
    """The sizes of the weight, which the three tensors must agree on."""
    missing = [part for part in ("compressed", "shape") if f"{module}.{part}" not in names]
    if missing:
        raise CheckpointError(
            f"tensor {f'{module}.bitmask'!r} of {source.info(f'{module}.bitmask').file} is stored, but {missing[0]!r} "
            "beside it is missing: download the checkpoint again"
        )
    sizes = source.read(f"{module}.shape").flatten().tolist()
    kept, mask = source.info(f"{module}.compressed"), source.info(f"{module}.bitmask")
    if len(sizes) == 2 and int(sizes[1]) % GROUP == 0:
        rows, columns = int(sizes[0]), int(sizes[1])
        if (
            kept.shape == (rows, columns // 2)
            and mask.shape == (rows, -(-columns // 8))
            and mask.dtype == torch.uint8
            and kept.dtype in (torch.float8_e4m3fn, *HALVES)
        ):
            return rows, columns
    raise CheckpointError(
        f"tensors {f'{module}.compressed'!r} {list(kept.shape)} and {f'{module}.bitmask'!r} {list(mask.shape)} of "
        f"{kept.file} do not hold 2:4 weights of the shape {sizes} in 8 or 16 bits: download the checkpoint again"
    )
