"""The environment variables that Plexor reads."""

from __future__ import annotations

import pytest

from plexor.config import Environment
from plexor.errors import ConfigError


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Environment(plugins=None, debug=False)),
        ({"PLEXOR_PLUGINS": ""}, Environment(plugins=frozenset())),
        ({"PLEXOR_PLUGINS": "a, b,"}, Environment(plugins=frozenset({"a", "b"}))),
        ({"PLEXOR_DEBUG": "1"}, Environment(debug=True)),
        ({"PLEXOR_DEBUG": "0"}, Environment(debug=False)),
    ],
)
def test_variables_are_read(variables: dict[str, str], expected: Environment) -> None:
    assert Environment.read(variables) == expected


def test_a_value_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="PLEXOR_DEBUG is 'yes'"):
        Environment.read({"PLEXOR_DEBUG": "yes"})
