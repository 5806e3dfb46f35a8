"""What a command imports before its first token, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from plexor.runtime.startup import _open_gpu, import_engine

NEEDLESS = ("transformers", "torch._dynamo", "torch._inductor", "sympy", "rich", "jinja2", "fastapi", "pydantic", "PIL")
"""Each takes from a tenth of a second to seconds, and none is needed to continue a prompt."""

GENERATE = """
import gc, json, sys
from plexor.cli.main import main
code = main(["generate", "--device", "cpu", "--prompt", "The", "--max-tokens", "2"])
print(json.dumps({"code": code, "modules": sorted(sys.modules), "frozen": gc.get_freeze_count(), "gc": gc.isenabled()}))
"""


def test_a_prompt_is_continued_without_what_it_does_not_need() -> None:
    output = subprocess.run([sys.executable, "-c", GENERATE], capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["code"] == 0
    assert not set(NEEDLESS) & set(found["modules"])
    assert found["frozen"] > 100_000
    assert found["gc"] is True


def test_where_the_engine_is_imported_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    import plexor.runtime.engine  # noqa: F401
    import plexor.runtime.startup as startup

    monkeypatch.setattr(startup, "_open_gpu", pytest.fail)
    import_engine("auto")


def test_a_machine_without_a_driver_is_not_told_of_it_here() -> None:
    _open_gpu()
