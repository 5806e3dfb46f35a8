"""What a kernel names is called as it is, or made anew for each binding."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import pytest

from plexor.extension.specs import Facts, Kernel, Op
from plexor.kernels.table import KernelTable


class Counter:
    """Adds up what it is called with."""

    def __init__(self, start: int = 0) -> None:
        self.total = start

    def __call__(self, number: int) -> int:
        self.total += number
        return self.total


def added(start: int, number: int) -> int:
    return start + number


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> KernelTable:
    """Providers of one op, by their names: a function, a class, and partials of both."""
    module = ModuleType("providers_of_a_test")
    providers = {"plain": partial(added, 7), "made": Counter, "begun": partial(Counter, 7), "function": added}
    for name, provider in providers.items():
        setattr(module, name, provider)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ops = [Op(name=name, reference="math:sqrt", samples="math:sqrt", tolerance={}) for name in providers]
    kernels = [
        Kernel(
            op=name,
            provider="test",
            load=f"{module.__name__}:{name}",
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"float32"}),
        )
        for name in providers
    ]
    return KernelTable(ops, kernels)


FACTS = Facts("cpu", "float32")


@pytest.mark.parametrize(("name", "start"), [("made", 0), ("begun", 7)])
def test_each_binding_of_a_class_has_its_own_instance(table: KernelTable, name: str, start: int) -> None:
    first, second = table.bind(name, FACTS), table.bind(name, FACTS)
    assert [first(1), first(1), second(5)] == [start + 1, start + 2, start + 5]


def test_a_function_is_called_as_it_is(table: KernelTable) -> None:
    assert table.bind("function", FACTS)(2, 3) == 5
    assert table.bind("plain", FACTS)(3) == 10
