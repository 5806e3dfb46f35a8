"""What attends one-row sequences on the device at hand, and how it is cut up, told without importing what may lack."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from plexor.extension.specs import Facts
from plexor.kernels.cuda.refusal import has_bindings, refuses_launches
from plexor.kernels.triton.paged_attention import AttendDecodes

HEAD_SIZES = (64, 128)
MOST_GROUP = 8
"""Query heads that share a KV head: those of a fragment."""


MOST_ROWS = 32
"""Of a cluster: each lane of a warp knows one."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work is cut up.

    warps: of a block. cluster: blocks that share a KV head's rows. shifts: clusters of each KV head, which share the
    rows out. spread: 16 positions, so many times, are a tile. registers: of a thread at most.
    """

    warps: int
    cluster: int
    shifts: int
    spread: int
    registers: int

    def shared_bytes(self, head_size: int, group: int) -> int:
        """Of a block: a part for each warp, what the cluster's parts are added up from, marks, and a barrier."""
        numbers = group * head_size
        return 4 * self.warps * numbers + 2 * numbers // 4 * 24 + 8 * self.warps * group + 16


def cut_for(num_rows: int, num_kv_heads: int, entry_bytes: int) -> Cut:
    """As measured on an H200 for 8 KV heads (bench/NOTES.md), with as many blocks for other numbers of them.

    Two rows share a cluster, so that a long one beside a short one has more than its half of the blocks.
    """
    blocks = 64 if num_rows <= 8 else 32
    cluster = 16
    while cluster > 1 and cluster * num_kv_heads > blocks:
        cluster //= 2
    return Cut(8 if num_rows == 1 else 4, cluster, -(-num_rows // 2), max(1, 256 // entry_bytes), 152)


def refuses(facts: Facts) -> str | None:
    """The reason against clusters of blocks for heads of these sizes, or None."""
    if facts.capability is not None and facts.capability[0] != 9:
        return "is tuned for compute capability 9.x, this device has {}.{}".format(*facts.capability)
    size = facts.shape.get("head_size", HEAD_SIZES[0])
    if size not in HEAD_SIZES:
        return f"takes heads of {HEAD_SIZES[0]} or {HEAD_SIZES[1]} features, not {size}"
    group = facts.shape.get("num_heads", 1) // facts.shape.get("num_kv_heads", 1)
    if group > MOST_GROUP:
        return f"takes at most {MOST_GROUP} query heads for each KV head, not {group}"
    return refuses_launches(facts)


def decodes_here() -> AttendDecodes | None:
    """Clusters of blocks for few rows where they can be launched; None leaves all rows to Triton."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9 or not has_bindings():
        return None
    from plexor.kernels.cuda.paged_attention import Decodes

    return Decodes()
