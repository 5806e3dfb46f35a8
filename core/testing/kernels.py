"""Hold every provider in a kernel table to the reference of its op, on the op's own samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plexor.extension.specs import Facts, Kernel, Op, Tolerance
from plexor.kernels.op import Sample
from plexor.kernels.table import KernelTable, bound, resolve

INTERPRETED = "triton"
"""Providers whose name begins so run on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""


def cases(table: KernelTable, device: torch.device) -> Iterator[tuple[str, str, torch.dtype]]:
    """(op, provider, dtype) of every provider that can run on the device, to parametrise a test with.

    On a CPU these are the CPU's own providers and, where there is no CUDA device to run them on, those that the
    interpreter runs; each of them may still have a `reason_to_skip`.
    """
    for name, op in table.ops.items():
        for kernel in table.kernels(name):
            if device.type in kernel.devices or (device.type == "cpu" and _interpretable(kernel)):
                for dtype in sorted(kernel.dtypes & op.tolerance.keys()):
                    yield name, kernel.provider, getattr(torch, dtype)


def reason_to_skip(table: KernelTable, op: str, provider: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a case cannot be run although its provider serves it; None if it can."""
    if not _is_interpreted(_kernel(table, op, provider), device):
        return None
    if dtype == torch.bfloat16:
        return "Triton's interpreter rounds bfloat16 towards zero and multiplies its bit patterns in tl.dot"
    from triton import knobs

    if not knobs.runtime.interpret:
        return "set TRITON_INTERPRET=1 before triton is imported, so that its interpreter runs this provider"
    return None


def check_kernel(table: KernelTable, op: str, provider: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run a provider on each sample of its op and compare what it returns and writes with the reference.

    AssertionError names the sample and says how far they are apart. Samples whose cache or sizes the provider does not
    claim are left out; at least one must remain. Those that the interpreter cannot run are named in a warning.
    """
    spec = table.ops[op]
    kernel = _kernel(table, op, provider)
    reference: Callable[..., Any] = resolve(spec.reference)
    function = bound(kernel)
    tolerance = spec.tolerance[_name(dtype)]
    num_run = 0
    not_interpreted = []
    samples: Iterable[Sample] = resolve(spec.samples)(device, dtype)
    for sample in samples:
        if not _claims(spec, kernel, sample, device, dtype):
            continue
        if _is_interpreted(kernel, device) and sample.kv_dtype in ("bfloat16", "float8_e4m3fn"):
            not_interpreted.append(sample.name)
            continue
        _check_sample(f"{op} by {provider}, sample {sample.name!r}", sample, function, reference, tolerance)
        num_run += 1
    if not_interpreted:
        warnings.warn(
            f"{op} by {provider}: Triton's interpreter cannot store this cache: {', '.join(not_interpreted)}",
            stacklevel=2,
        )
    assert num_run > 0, f"{op} by {provider}: it claims none of the op's samples in {_name(dtype)}"


def _check_sample(
    title: str, sample: Sample, function: Callable[..., Any], reference: Callable[..., Any], tolerance: Tolerance
) -> None:
    expected_args, actual_args = _copied(sample.args), _copied(sample.args)
    expected = reference(*expected_args)
    with _poisoned_memory():
        actual = function(*actual_args)
    _compare(f"{title}, result", expected, actual, tolerance)
    for place, untouched in enumerate(sample.args):
        if place in sample.written:
            _compare(f"{title}, argument {place}", expected_args[place], actual_args[place], tolerance)
        elif place not in sample.spent:
            _compare(f"{title}, argument {place}, which is only read", untouched, actual_args[place], (0.0, 0.0))


def _compare(title: str, expected: Any, actual: Any, tolerance: Tolerance) -> None:
    """Two results alike in structure; AssertionError with figures where they differ."""
    assert type(expected) is type(actual), f"{title}: {type(actual).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, Tensor):
        _compare_tensors(title, expected, actual, tolerance)
    elif isinstance(expected, Mapping):
        assert expected.keys() == actual.keys(), f"{title}: {list(actual)} instead of {list(expected)}"
        for name, part in expected.items():
            _compare(f"{title}, {name}", part, actual[name], tolerance)
    elif is_dataclass(expected):
        for part in _compared(expected):
            _compare(f"{title}, {part}", getattr(expected, part), getattr(actual, part), tolerance)
    elif isinstance(expected, tuple | list):
        assert len(expected) == len(actual), f"{title}: {len(actual)} parts instead of {len(expected)}"
        for place, part in enumerate(expected):
            _compare(f"{title}, part {place}", part, actual[place], tolerance)
    else:
        assert expected == actual, f"{title}: {actual!r} instead of {expected!r}"


def _compared(value: Any) -> list[str]:
    """The fields of a dataclass that are its content; a provider may keep what it derives in the others."""
    return [part.name for part in fields(value) if part.compare]


def _compare_tensors(title: str, expected: Tensor, actual: Tensor, tolerance: Tolerance) -> None:
    for fact in ("shape", "dtype", "device"):
        wanted, given = getattr(expected, fact), getattr(actual, fact)
        assert wanted == given, f"{title}: {fact} {given} instead of {wanted}"
    relative, absolute = _widened(tolerance, expected.dtype)
    wide_expected, wide_actual = expected.detach().double().cpu(), actual.detach().double().cpu()
    error = (wide_expected - wide_actual).abs()
    near = error.isfinite() & (error <= absolute + relative * wide_expected.abs())
    fits = near | (wide_expected == wide_actual) | (wide_expected.isnan() & wide_actual.isnan())
    if bool(fits.all()):
        return
    severity = torch.where(fits, -1.0, error.nan_to_num(nan=float("inf")))
    worst = torch.unravel_index(severity.argmax(), severity.shape)
    where = tuple(int(index) for index in worst)
    raise AssertionError(
        f"{title}: {int((~fits).sum())} of {fits.numel()} values are off; at {where} it is {wide_actual[where]:.9g} "
        f"instead of {wide_expected[where]:.9g}, which is more than {relative} relative + {absolute} absolute"
    )


def _widened(tolerance: Tolerance, dtype: torch.dtype) -> Tolerance:
    """A tolerance for what is stored in a narrow dtype: a last bit before the rounding may move it by a whole step."""
    if tolerance == (0.0, 0.0):
        return tolerance
    if not dtype.is_floating_point:
        return tolerance[0], max(tolerance[1], 1.0)
    facts = torch.finfo(dtype)
    return max(tolerance[0], facts.eps), max(tolerance[1], facts.smallest_normal * facts.eps)


def _copied(value: Any) -> Any:
    """A deep copy in which tensors keep their strides; the gaps of a view are NaN."""
    if isinstance(value, tuple | list):
        return type(value)(_copied(part) for part in value)
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _copied(getattr(value, part.name)) for part in fields(value)})
    return _copied_tensor(value) if isinstance(value, Tensor) else value


def _copied_tensor(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or not tensor.is_floating_point():
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((extent,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN or the largest integer inside, so that what a provider leaves unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills


def _claims(op: Op, kernel: Kernel, sample: Sample, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the table would let the provider serve a sample."""
    interpreted = _is_interpreted(kernel, device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    facts = Facts(
        device=next(iter(kernel.devices)) if interpreted else device.type,
        capability=kernel.capability if interpreted else capability,
        dtype=_name(dtype),
        kv_dtype=sample.kv_dtype,
        shape=dict(sample.shape),
    )
    return KernelTable((op,), (kernel,)).explain(op.name, facts).winner == kernel.provider


def _kernel(table: KernelTable, op: str, provider: str) -> Kernel:
    return next(kernel for kernel in table.kernels(op) if kernel.provider == provider)


def _is_interpreted(kernel: Kernel, device: torch.device) -> bool:
    return device.type not in kernel.devices


def _interpretable(kernel: Kernel) -> bool:
    return kernel.provider.startswith(INTERPRETED) and not torch.cuda.is_available()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
