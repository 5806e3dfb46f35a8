"""The catalog: look-ups, and errors that say how to get what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plexor.errors import CheckpointError, ConfigError, PlexorError, PluginError
from plexor.extension import index
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Facts

Install = Callable[..., None]

KNOWN = {
    "plexor-stone": {"architectures": ["GraniteModel"], "layers": ["feed_forward/mortar"]},
    "plexor-tiny": {"checkpoints": ["pebble"], "precisions": ["int3"]},
}


@pytest.fixture(autouse=True)
def known_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of two plugins that exist nowhere else, and an empty working folder."""
    path = tmp_path / "index.json"
    path.write_text(json.dumps(KNOWN))
    monkeypatch.setattr(index, "INDEX_FILE", path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def plugin(hook: str, *specs: str) -> str:
    """The source of a plugin with one hook."""
    return (
        "from plexor import hookimpl\n"
        "from plexor.api import Architecture, Checkpoint, InputProcessor, KVFormat, Layer, Precision\n"
        f"@hookimpl\ndef {hook}():\n    return [{', '.join(specs)}]\n"
    )


def architecture(name: str, needs: str = "()") -> str:
    return plugin(
        "architectures", f"Architecture(name={name!r}, config='a:b', model='a:c', weights='a:d', needs={needs})"
    )


def checkpoint(name: str, folder: str, default: bool = False) -> str:
    return f"Checkpoint(name={name!r}, folder={folder!r}, summary='a stone', default={default})"


def error_of(call: Callable[[], object], kind: type[PlexorError]) -> str:
    """The message of the error that a call must raise."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def test_what_is_there_is_found(install: Install) -> None:
    install("stone", architecture("GraniteModel"), version="1.4")
    install("walls", plugin("layers", "Layer(slot='feed_forward', name='brick', build='a:b')"))
    install(
        "eyes", plugin("input_processors", "InputProcessor(architecture='GraniteModel', kind='image', build='a:b')")
    )
    catalog = Catalog.load(strict=True)
    assert catalog.architecture("GraniteModel") is catalog.architectures["GraniteModel"]
    assert catalog.layer("feed_forward", "brick").build == "a:b"
    assert catalog.input_processor("GraniteModel", "image").kind == "image"
    assert catalog.op("rms_norm").name == "rms_norm"
    assert catalog.owner("architectures", "GraniteModel").distribution == "plexor-stone"
    assert catalog.identity == (("plexor", "0.1.0"), ("eyes", "1.0"), ("stone", "1.4"), ("walls", "1.0"))


def test_tables_cannot_be_written(install: Install) -> None:
    with pytest.raises(TypeError):
        Catalog.load().ops["new"] = None  # type: ignore[index]


def test_the_environment_chooses_plugins(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("stone", architecture("GraniteModel"))
    install("sand", architecture("SandModel"))
    monkeypatch.setenv("PLEXOR_PLUGINS", "sand")
    assert set(Catalog.load().architectures) == {"SandModel"}
    monkeypatch.setenv("PLEXOR_PLUGINS", "")
    assert set(Catalog.load().architectures) == set()
    assert set(Catalog.load(allow=frozenset({"stone"})).architectures) == {"GraniteModel"}


def test_an_uninstalled_plugin_is_named_with_its_command(install: Install) -> None:
    message = error_of(lambda: Catalog.load().architecture("GraniteModel"), PluginError)
    assert message == (
        "no loaded plugin brings the architecture 'GraniteModel': it comes with `pip install plexor-stone`"
    )


def test_an_old_plugin_is_upgraded(install: Install) -> None:
    install("stone", architecture("ChalkModel"))
    message = error_of(lambda: Catalog.load().architecture("GraniteModel"), PluginError)
    assert message.endswith("it comes with `pip install --upgrade plexor-stone`")


def test_a_broken_plugin_is_named_with_its_reason(install: Install) -> None:
    install("stone", "raise OSError('libgravel.so')")
    message = error_of(lambda: Catalog.load().architecture("GraniteModel"), PluginError)
    assert "plugin 'stone' (plexor-stone) would, but it is broken (its import failed (OSError: libgravel.so)" in message


def test_a_broken_plugin_that_no_index_knows_is_named_by_what_it_claimed(install: Install) -> None:
    twice = "Architecture(name='OwnModel', config='a:b', model='a:c', weights='a:d')"
    install("private", plugin("architectures", twice, twice))
    message = error_of(lambda: Catalog.load().architecture("OwnModel"), PluginError)
    assert "plugin 'private' (plexor-private) would, but it is broken ('private' and 'private' both claim" in message


def test_a_disabled_plugin_is_named(install: Install) -> None:
    install("stone", architecture("GraniteModel"))
    catalog = Catalog.load(allow=frozenset())
    message = error_of(lambda: catalog.architecture("GraniteModel"), PluginError)
    assert "plugin 'stone' (plexor-stone) would, but it is disabled (PLEXOR_PLUGINS does not list 'stone')" in message


def test_a_mistyped_name_gets_the_near_one(install: Install) -> None:
    install("stone", architecture("GraniteModel"))
    catalog = Catalog.load()
    assert error_of(lambda: catalog.architecture("GranitModel"), ConfigError) == (
        "no plugin that is known brings the architecture 'GranitModel': did you mean 'GraniteModel'?"
    )
    assert error_of(lambda: catalog.precision("int4"), ConfigError) == (
        "no plugin that is known brings the precision 'int4': did you mean 'int3'? "
        "it comes with `pip install plexor-tiny`"
    )
    assert error_of(lambda: catalog.architecture("Zyx"), ConfigError).endswith("'Zyx': known are GraniteModel")


def test_an_unknown_name_mentions_broken_plugins_that_might_have_it(install: Install) -> None:
    install("mystery", "raise OSError")
    message = error_of(lambda: Catalog.load().architecture("Zyx"), ConfigError)
    assert "'Zyx' (though the broken 'mystery' may: see `plexor plugins`): none is installed" in message


def test_what_an_architecture_needs_is_checked_when_it_is_chosen(install: Install) -> None:
    install("house", architecture("HouseModel", "('layers:feed_forward/mortar', 'ops:rms_norm')"))
    message = error_of(lambda: Catalog.load().architecture("HouseModel"), PluginError)
    assert message == (
        "plugin 'house' needs more for HouseModel: no loaded plugin brings the layer 'feed_forward/mortar': "
        "it comes with `pip install plexor-stone`"
    )
    install("stone", plugin("layers", "Layer(slot='feed_forward', name='mortar', build='a:b')"))
    assert Catalog.load().architecture("HouseModel").name == "HouseModel"


def test_a_model_is_a_folder_or_a_shipped_checkpoint(install: Install, tmp_path: Path) -> None:
    install(
        "tiny", plugin("checkpoints", checkpoint("pebble", "pebbles:files/round"), checkpoint("rock", "pebbles:gone"))
    )
    shipped = tmp_path / "site-packages" / "pebbles" / "files" / "round"
    shipped.mkdir(parents=True)
    (shipped.parents[1] / "__init__.py").write_text("raise RuntimeError('a name is resolved without importing')")
    catalog = Catalog.load()
    assert catalog.resolve_model("pebble") == shipped
    assert "reinstall plexor-tiny" in error_of(lambda: catalog.resolve_model("rock"), PluginError)
    Path("pebble").mkdir()
    assert catalog.resolve_model("pebble") == Path("pebble")
    assert catalog.resolve_model(str(tmp_path)) == tmp_path


def test_a_model_that_is_nowhere(install: Install, tmp_path: Path) -> None:
    catalog = Catalog.load()
    assert error_of(lambda: catalog.resolve_model("pebble"), PluginError).endswith("`pip install plexor-tiny`")
    assert "did you mean 'pebble'? it comes with `pip inst" in error_of(
        lambda: catalog.resolve_model("peble"), ConfigError
    )
    Path("granite").mkdir()
    assert "did you mean 'granite'?" in error_of(lambda: catalog.resolve_model("granit"), CheckpointError)
    assert "nothing is downloaded" in error_of(lambda: catalog.resolve_model("someone/granite"), CheckpointError)
    Path("weights.safetensors").touch()
    assert "is a file: name the folder" in error_of(
        lambda: catalog.resolve_model("weights.safetensors"), CheckpointError
    )


def test_the_default_checkpoint_is_the_only_one(install: Install) -> None:
    assert "or `pip install plexor-tiny`" in error_of(Catalog.load().default_checkpoint, ConfigError)
    install("tiny", plugin("checkpoints", checkpoint("pebble", "a:b", True), checkpoint("rock", "a:c")))
    assert Catalog.load().default_checkpoint().name == "pebble"
    install("more", plugin("checkpoints", checkpoint("boulder", "a:b", True)))
    assert "2 default checkpoints (boulder, pebble)" in error_of(Catalog.load().default_checkpoint, ConfigError)


def test_the_kernel_table_holds_every_op_and_kernel(install: Install) -> None:
    table = Catalog.load().kernel_table({"rms_norm": "reference"})
    assert table.explain("rms_norm", Facts(device="cuda", dtype="bfloat16", capability=(9, 0))).winner == "reference"
    assert any(kernel.provider == "triton" for kernel in table.kernels("rms_norm"))


def test_listing_plugins_imports_no_torch() -> None:
    code = (
        "import sys, plexor\n"
        "from plexor.extension.catalog import Catalog\n"
        "catalog = Catalog.load()\n"
        "catalog.kernel_table()\n"
        "assert any(report.name == 'plexor' for report in catalog.reports)\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'fastapi', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plugin_appears_in_a_new_process_once_it_is_on_the_path(install: Install, tmp_path: Path) -> None:
    install("stone", architecture("GraniteModel"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site-packages')!r})\n"
        "from plexor.extension.catalog import Catalog\n"
        "print(Catalog.load(allow=frozenset({'stone'})).owner('architectures', 'GraniteModel').distribution)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("plexor-stone\n", "")
