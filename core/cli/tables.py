"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from plexor.kernels.table import Choice


def print_choices(choices: Iterable[Choice]) -> None:
    """One block for each op: the winner first, then why each other provider lost."""
    for choice in choices:
        sizes = ", ".join(f"{name} {size}" for name, size in choice.facts.shape.items())
        print(f"{choice.op}{f' ({sizes})' if sizes else ''}: {choice.winner}")
        for verdict in choice.verdicts:
            if verdict.provider != choice.winner:
                print(f"    not {verdict.provider}: {verdict.reason}")
