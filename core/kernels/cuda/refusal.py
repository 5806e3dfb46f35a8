"""Why kernels in CUDA C++ cannot serve, told without importing what they need."""

from __future__ import annotations

from importlib.util import find_spec

from plexor.extension.specs import Facts


def refuses(facts: Facts) -> str | None:
    """The reason against a product of these sizes, or None."""
    outputs, inputs = facts.shape.get("out_features", 16), facts.shape.get("in_features", 64)
    if facts.capability is not None and facts.capability[0] != 9:
        return "uses instructions of compute capability 9.x, this device has {}.{}".format(*facts.capability)
    if outputs % 16 or inputs % 64:
        return f"copies boxes of 64 inputs for tiles of 16 outputs, which {inputs} and {outputs} are not multiples of"
    if facts.device == "cuda" and find_spec("cuda") is None:
        return "needs cuda.bindings, which comes with torch for CUDA: pip install cuda-bindings"
    return None
