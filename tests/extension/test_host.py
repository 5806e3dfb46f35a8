"""The host: whatever one plugin does, it is reported with a reason and the others work."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import pytest

from plexor.errors import ConfigError, PluginError
from plexor.extension.host import Host, PluginReport

Install = Callable[..., None]

HEAD = """
from plexor import hookimpl
from plexor.api import Architecture, Kernel, KVFormat, Layer, Op, Precision
"""


def architecture(name: str, needs: str = "()") -> str:
    """The source of a sound plugin with one architecture."""
    return HEAD + (
        f"@hookimpl\ndef architectures():\n"
        f"    return [Architecture(name={name!r}, config='a:b', model='a:c', weights='a:d', needs={needs})]\n"
    )


def kernel(op: str, provider: str) -> str:
    """The source of a sound plugin with one kernel."""
    return HEAD + (
        f"@hookimpl\ndef kernels():\n"
        f"    return [Kernel(op={op!r}, provider={provider!r}, load='a:b',"
        f" devices=frozenset(['cpu']), dtypes=frozenset(['float32']))]\n"
    )


def load(allow: frozenset[str] | None = None) -> tuple[Host, dict[str, PluginReport]]:
    """The host and its reports by name."""
    host = Host.load(strict=False, allow=allow)
    return host, {report.name: report for report in host.reports}


def test_a_sound_plugin_is_loaded_and_reported(install: Install) -> None:
    install("good", architecture("GoodModel"), version="2.3")
    host, reports = load()
    assert reports["good"] == PluginReport(
        "good", "plexor-good", "2.3", "loaded", "", {"architectures": ("GoodModel",)}
    )
    claim = host.claims["architectures"]["GoodModel"]
    assert (claim.plugin, claim.spec.config) == ("good", "a:b")


def test_the_core_comes_first_and_contributes_through_the_same_hooks(install: Install) -> None:
    host, reports = load()
    assert list(reports) == ["plexor"]
    assert set(reports["plexor"].offers["ops"]) == set(host.claims["ops"])
    assert host.claims["ops"]["rms_norm"].plugin == "plexor"


BROKEN = {
    "raises at import": (
        "raise RuntimeError('no such device')",
        r"its import failed \(RuntimeError: no such device\): update or reinstall plexor-bad",
    ),
    "exits at import": ("raise SystemExit(3)", r"its import failed \(SystemExit: 3\)"),
    "is no Python": ("def def", r"its import failed \(SyntaxError: "),
    "imports what is missing": ("import nowhere_to_be_found", r"ModuleNotFoundError: No module named 'nowhere_to_be_f"),
    "implements nothing": ("x = 1", r"implements no hook: mark its functions with @plexor.hookimpl"),
    "mistypes a hook": (
        HEAD + "@hookimpl\ndef architecture():\n    return []",
        r"unknown hook 'architecture': did you mean 'architectures'\?",
    ),
    "has a wrong signature": (
        HEAD + "@hookimpl\ndef architectures(catalog):\n    return []",
        r"a hook has the wrong signature: .*catalog",
    ),
    "gives a default": (
        HEAD + "@hookimpl\ndef commands(subparsers=None):\n    pass",
        r"hook 'commands' gives subparsers a default, which would always win: remove",
    ),
    "wraps": (
        HEAD + "@hookimpl(wrapper=True)\ndef ops():\n    return (yield)",
        r"hook 'ops' is a wrapper",
    ),
    "implements a hook twice": (
        HEAD + "".join(f"@hookimpl(specname='ops')\ndef {name}():\n    return []\n" for name in ("some", "more")),
        r"implements the hook 'ops' 2 times: let one return everything",
    ),
    "raises in a hook": (
        HEAD + "@hookimpl\ndef architectures():\n    return [1 // 0]",
        r"hook 'architectures' failed \(ZeroDivisionError: ",
    ),
    "raises while yielding": (
        HEAD + "@hookimpl\ndef layers():\n    yield Layer(slot='a', name='b', build='c:d')\n    raise KeyError('x')",
        r"hook 'layers' failed \(KeyError: 'x'\)",
    ),
    "returns nothing": (HEAD + "@hookimpl\ndef architectures():\n    pass", r"failed \(TypeError: .*not iterable"),
    "returns garbage": (HEAD + "@hookimpl\ndef architectures():\n    return ['x']", r"returned 'x' among its specs"),
    "returns another spec": (
        HEAD + "@hookimpl\ndef ops():\n    return [Layer(slot='a', name='b', build='c:d')]",
        r"returned Layer\(slot='a'.*, where Op is due",
    ),
    "names nothing": (
        HEAD + "@hookimpl\ndef layers():\n    return [Layer(slot='a', name='', build='c:d')]",
        r"returned Layer with name='', where a string is due",
    ),
    "gives a number for a name": (
        HEAD + "@hookimpl\ndef layers():\n    return [Layer(slot='a', name=7, build='c:d')]",
        r"returned Layer with name=7, where a string is due",
    ),
    "gives a module for a target": (
        HEAD + "@hookimpl\ndef layers():\n    return [Layer(slot='a', name='b', build='c')]",
        r"returned Layer with build='c', where 'package.module:attribute' is due",
    ),
    "gives a list for a set": (
        HEAD + "@hookimpl\ndef kernels():\n"
        "    return [Kernel(op='rms_norm', provider='p', load='a:b', devices=['cpu'], dtypes=frozenset())]",
        r"returned Kernel with devices=\['cpu'\], where a frozenset of strings is due",
    ),
    "gives one need without its comma": (
        architecture("X", needs="('layers:a/b')"),
        r"returned Architecture with needs='layers:a/b', where a tuple of strings is due",
    ),
    "needs what is no hook": (
        architecture("X", needs="('layer:a/b',)"),
        r"returned Architecture with 'layer:a/b' among its needs, where 'hook:key' is due",
    ),
    "claims one key twice": (
        HEAD + "@hookimpl\ndef layers():\n    return [Layer(slot='a', name='b', build='c:d')] * 2",
        r"'bad' and 'bad' both claim 'a/b' in layers",
    ),
    "claims what the core has": (kernel("rms_norm", "triton"), r"'plexor' and 'bad' both claim 'rms_norm/triton' in k"),
    "serves an unknown op": (
        kernel("no_such_op", "p"),
        r"kernel 'no_such_op/p' is for an op that no loaded plugin dec",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(case: str, install: Install) -> None:
    source, reason = BROKEN[case]
    install("bad", source)
    install("awake", architecture("BeforeModel"))
    install("fine", architecture("AfterModel"))
    host, reports = load()
    assert reports["bad"].state == "broken"
    assert re.search(reason, reports["bad"].reason), reports["bad"].reason
    assert "\n" not in reports["bad"].reason
    assert [reports[name].state for name in ("plexor", "awake", "fine")] == ["loaded"] * 3
    assert {"BeforeModel", "AfterModel"} <= set(host.claims["architectures"])
    assert not any(claim.plugin == "bad" for claims in host.claims.values() for claim in claims.values())


@pytest.mark.parametrize("case", BROKEN)
def test_strict_raises_and_names_the_plugin(case: str, install: Install) -> None:
    source, reason = BROKEN[case]
    install("bad", source)
    with pytest.raises(PluginError, match=r"plugin 'bad' \(plexor-bad\) is broken: .*" + reason):
        Host.load(strict=True, allow=None)


def test_the_first_of_two_claims_holds_whatever_was_installed_first(install: Install) -> None:
    install("zebra", architecture("SharedModel"))
    install("ant", architecture("SharedModel"))
    host, reports = load()
    assert host.claims["architectures"]["SharedModel"].plugin == "ant"
    assert reports["zebra"].state == "broken"
    assert reports["zebra"].reason.startswith("'ant' and 'zebra' both claim 'SharedModel' in architectures")
    assert reports["zebra"].offers == {"architectures": ("SharedModel",)}


def test_two_providers_of_one_op_may_live_side_by_side(install: Install) -> None:
    install("one", kernel("rms_norm", "one"))
    install("two", kernel("rms_norm", "two"))
    host, _ = load()
    assert {"rms_norm/one", "rms_norm/two"} <= set(host.claims["kernels"])


def test_two_distributions_with_one_plugin_name(install: Install) -> None:
    install("same", architecture("FirstModel"), distribution="a-first")
    install("same", architecture("SecondModel"), distribution="b-second")
    host = Host.load(strict=False, allow=None)
    assert [(report.distribution, report.state) for report in host.reports[1:]] == [
        ("a-first", "loaded"),
        ("b-second", "broken"),
    ]
    assert "another distribution brings a plugin 'same' too" in host.reports[2].reason


def test_kernels_follow_the_plugin_that_declares_their_op(install: Install) -> None:
    op = HEAD + "@hookimpl\ndef ops():\n    return [Op(name='extra', reference='a:b', samples='a:c', tolerance={})]\n"
    install("kernels", kernel("extra", "fast"))
    install("opener", op)
    assert load()[1]["kernels"].state == "loaded"
    assert load(allow=frozenset({"kernels"}))[1]["kernels"].state == "broken"


@pytest.mark.parametrize(
    ("requirement", "state"),
    [
        ("plexor>=0.1,<0.2", "loaded"),
        ("plexor", "loaded"),
        ("Plexor[serve]==0.1.*", "loaded"),
        ("plexor>=99", "broken"),
        ("plexor<0.1", "broken"),
        ("plexor>=99; python_version < '3'", "loaded"),
        ("plexor>=99; extra == 'more'", "loaded"),
        ("plexor-other>=99", "loaded"),
    ],
)
def test_the_requirement_on_plexor_is_checked_when_it_runs(requirement: str, state: str, install: Install) -> None:
    install("pinned", architecture("PinnedModel"), requires=("packaging", requirement))
    report = load()[1]["pinned"]
    assert report.state == state
    if state == "broken":
        assert "this is 0.1.0: `pip install --upgrade plexor plexor-pinned`" in report.reason


def test_a_plugin_for_another_version_is_not_imported(install: Install) -> None:
    install("future", "raise RuntimeError('imported')", requires=("plexor>=99",))
    assert "imported" not in load()[1]["future"].reason


def test_only_allowed_plugins_are_imported(install: Install) -> None:
    install("wanted", architecture("WantedModel"))
    install("other", "raise RuntimeError('imported')")
    host, reports = load(allow=frozenset({"wanted"}))
    assert (reports["wanted"].state, reports["other"].state) == ("loaded", "disabled")
    assert reports["other"].reason == "PLEXOR_PLUGINS does not list 'other'"
    assert set(host.claims["architectures"]) == {"WantedModel"}
    assert [report.state for report in load(allow=frozenset())[1].values()] == ["loaded", "disabled", "disabled"]


def test_an_allowed_plugin_must_be_installed(install: Install) -> None:
    install("wanted", architecture("WantedModel"))
    with pytest.raises(ConfigError, match=r"lists 'wantd', which is not installed: did you mean 'wanted'\?"):
        load(allow=frozenset({"wantd"}))


def test_commands_are_added_one_plugin_at_a_time(install: Install) -> None:
    command = HEAD + "@hookimpl\ndef commands(subparsers):\n    subparsers.add_parser('{}')\n"
    install("a", command.format("brew"))
    install("b", command.format("brew"))
    install("c", command.format("pour"))
    host, reports = load()
    subparsers = argparse.ArgumentParser().add_subparsers()
    problems = host.add_commands(subparsers)
    assert set(subparsers.choices) == {"brew", "pour"}
    assert len(problems) == 1
    assert problems[0].startswith("plugin 'b' could not add its commands (ArgumentError: ")
    assert reports["c"].offers == {"commands": ()}
    with pytest.raises(PluginError, match="plugin 'b'"):
        Host.load(strict=True, allow=None).add_commands(argparse.ArgumentParser().add_subparsers())


def test_routes_are_added_only_for_named_plugins(install: Install) -> None:
    route = HEAD + "@hookimpl\ndef routes(app):\n    app.append('{}')\n"
    install("first", route.format("first"))
    install("second", route.format("second"))
    install("faulty", HEAD + "@hookimpl\ndef routes(app, engine):\n    raise ValueError(engine)\n")
    host, _ = load()
    app: list[str] = []
    host.add_routes(app, "an engine", ["second"])  # type: ignore[arg-type]
    assert app == ["second"]
    with pytest.raises(PluginError, match=r"'secnd', which brings no routes: did you mean 'second'\?"):
        host.add_routes(app, "an engine", ["secnd"])  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"plugin 'faulty' could not add its routes \(ValueError: an engine\)"):
        host.add_routes(app, "an engine", ["faulty"])  # type: ignore[arg-type]
