"""Choices that were measured: how a product of a size is multiplied fastest on a GPU.

A file for each kind of GPU comes with Plexor, `tuned/NAME.json`; `plexor tune` writes another one to the user's cache,
which goes before it. Both hold, for an op and the sizes of its weight, a variant for each number of rows that was
measured:

    {"linear_add 4096x14336 bfloat16": {"8": {"blocks": 2, "depth": 256}, "32": {"split": 2}, "256": null}}

null stands for the vendor's library. What was not measured is left to the kernels' own rules.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plexor.config import cache_folder
from plexor.errors import ConfigError

Choice = Mapping[str, int] | None
"""The numbers that make up a variant; None for the vendor's library."""

Choices = Mapping[str, Mapping[int, Choice]]
"""For each product, by its name, what to use for how many rows."""


@dataclass(frozen=True, slots=True)
class Product:
    """An op with a weight [outputs, inputs] in a dtype ("bfloat16")."""

    op: str
    outputs: int
    inputs: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.outputs}x{self.inputs} {self.dtype}"


def find(choices: Choices, product: Product, num_rows: int, default: Choice) -> Choice:
    """The choice for the next larger number of rows that was measured, since kernels fill up their tiles, else the
    default.
    """
    measured = choices.get(str(product), {})
    fitting = [rows for rows in measured if rows >= num_rows]
    return measured[min(fitting)] if fitting else default


@cache
def tuned(gpu: str) -> Choices:
    """Everything that was measured on GPUs of this name. A damaged file counts as none, with a warning."""
    together: dict[str, Mapping[int, Choice]] = {}
    for folder in (shipped_folder(), user_folder()):
        try:
            together |= read_choices(folder / file_name(gpu))
        except ConfigError as error:
            logging.getLogger(__name__).warning("%s", error)
    return together


def shipped_folder() -> Path:
    return Path(__file__).with_name("tuned")


def user_folder() -> Path:
    return cache_folder() / "tuned"


def file_name(gpu: str) -> str:
    """ "NVIDIA_H200.json" for "NVIDIA H200"."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in gpu) + ".json"


def read_choices(path: Path) -> Choices:
    """What a file holds, nothing if there is none; ConfigError if it cannot be understood."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {_MEND}") from error
    try:
        return {name: {int(rows): _checked(choice) for rows, choice in by.items()} for name, by in raw.items()}
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"{path} holds something else than measured choices ({error}): {_MEND}") from error


_MEND = "delete it, or measure again with `plexor tune`"


def _checked(choice: object) -> Choice:
    if choice is None:
        return None
    if isinstance(choice, dict) and all(type(value) is int for value in choice.values()):
        return choice
    raise ValueError(f"{choice!r} is no variant")


def write_choices(path: Path, choices: Choices) -> None:
    """Merge choices into a file: a product that is in both is taken from the new ones. A damaged file is replaced."""
    try:
        known = dict(read_choices(path))
    except ConfigError:
        known = {}
    merged = {**known, **choices}
    lines = [
        f"  {json.dumps(name)}: {json.dumps({str(rows): choice for rows, choice in sorted(merged[name].items())})}"
        for name in sorted(merged)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    scratch.replace(path)
