"""Why kernels in CUDA C++ cannot serve, told without importing what they need."""

from __future__ import annotations

from importlib.util import find_spec

from plexor.extension.specs import Facts


def refuses(facts: Facts) -> str | None:
    """The reason against a product of these sizes, or None."""
    return refuses_tiles(facts, 16, 64)


def refuses_tiles(facts: Facts, num_outputs: int, num_inputs: int) -> str | None:
    """The reason against a kernel that takes so many outputs and inputs at once, or None."""
    outputs, inputs = facts.shape.get("out_features", num_outputs), facts.shape.get("in_features", num_inputs)
    if facts.capability is not None and facts.capability[0] != 9:
        return "uses instructions of compute capability 9.x, this device has {}.{}".format(*facts.capability)
    if outputs % num_outputs or inputs % num_inputs:
        return (
            f"copies boxes of {num_inputs} inputs for tiles of {num_outputs} outputs, "
            f"which {inputs} and {outputs} are not multiples of"
        )
    return refuses_launches(facts)


def refuses_launches(facts: Facts) -> str | None:
    """The reason against any kernel in CUDA C++, whatever its sizes, or None."""
    if facts.device == "cuda" and not has_bindings():
        return "needs cuda.bindings, which comes with torch for CUDA: pip install cuda-bindings"
    return None


def has_bindings() -> bool:
    """Whether there is what compiles and launches kernels in CUDA C++."""
    return find_spec("cuda") is not None
