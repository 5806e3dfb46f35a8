"""What the plugin declares is there, under names that fit together."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import torch

from plexor.api import Facts, KernelTable, KVShape, resolve
from plexor_quant import plugin


def test_every_target_is_there() -> None:
    targets = [target for op in plugin.ops() for target in (op.reference, op.samples)]
    compiled = find_spec("cuda") is not None
    targets += [kernel.load for kernel in plugin.kernels() if compiled or kernel.provider != "cuda"]
    targets += [precision.format for precision in plugin.precisions()]
    targets += [kv_format.storage for kv_format in plugin.kv_formats()]
    targets += [target for spec in plugin.stored_weights() for target in (spec.recognises, spec.open, spec.precision)]
    assert all(callable(resolve(target)) for target in targets)


def test_listing_does_not_import_torch() -> None:
    script = (
        "import sys; from plexor_quant import plugin; "
        "plugin.ops(), plugin.kernels(), plugin.precisions(), plugin.kv_formats(), "
        "plugin.stored_weights(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_cache_keeps_one_byte_for_each_number() -> None:
    fp8, int8 = (
        [
            (part.name, part.shape, part.dtype)
            for part in resolve(kv_format.storage)(KVShape(5, 16, 2, 80), torch.bfloat16)
        ]
        for kv_format in plugin.kv_formats()
    )
    assert fp8 == [
        ("keys", (5, 16, 2, 80), torch.float8_e4m3fn),
        ("values", (5, 16, 2, 80), torch.float8_e4m3fn),
    ]
    assert int8 == [
        ("keys", (5, 16, 2, 80), torch.int8),
        ("values", (5, 16, 2, 80), torch.int8),
        ("key_scales", (5, 16, 2), torch.float32),
        ("value_scales", (5, 16, 2), torch.float32),
    ]


def test_kernels_say_why_they_cannot_serve() -> None:
    table = KernelTable(plugin.ops(), plugin.kernels())

    def explained(op: str, dtype: str, capability: tuple[int, int], **sizes: int) -> tuple[str, str]:
        choice = table.explain(op, Facts("cuda", dtype, capability, None, sizes))
        return choice.winner, next(verdict.reason for verdict in choice.verdicts if verdict.provider == "torch")

    hopper = (9, 0)
    assert explained("fp8_linear", "bfloat16", hopper, in_features=64, out_features=32) == ("torch", "")
    winner, reason = explained("fp8_linear", "bfloat16", hopper, in_features=64, out_features=33)
    assert (winner, reason) == ("reference", "needs out_features in multiples of 16, not 33")
    winner, reason = explained("fp8_linear", "float32", hopper, in_features=64, out_features=32)
    assert (winner, reason) == ("reference", "takes bfloat16, not float32")
    winner, reason = explained("fp8_grouped_linear", "bfloat16", (12, 0), in_features=64, out_features=32)
    assert (winner, reason) == ("reference", "is built for compute capability 9 and 10, this device has 12.0")
    winner, reason = explained("int8_linear", "float32", hopper, in_features=36, out_features=32)
    assert (winner, reason) == ("reference", "needs in_features in multiples of 8, not 36")
    winner, reason = explained("int8_wo_linear", "float16", hopper, in_features=64, out_features=32)
    assert (winner, reason) == ("reference", "takes bfloat16, not float16")
    assert explained("int4_wo_linear", "bfloat16", hopper, in_features=129, out_features=7) == ("torch", "")
    winner, reason = explained("int4_wo_grouped_linear", "bfloat16", hopper, in_features=64, out_features=36)
    assert (winner, reason) == ("reference", "needs out_features in multiples of 8, not 36")
