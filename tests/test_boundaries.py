"""Who may import whom, and which words the core may use: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core"
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
DOORS = {"plexor", "plexor.api", "plexor.testing"}

# Higher may import lower, never the other way round; a part may import itself.
LAYERS = {
    "__main__": 10,
    "cli": 9,
    "testing": 9,
    "api": 8,
    "server": 7,
    "benchmark": 7,
    "runtime": 6,
    "model": 5,
    "checkpoint": 4,
    "parallel": 3,
    "kernels": 2,
    "extension": 1,
    "batch": 0,
    "config": 0,
    "errors": -1,
}
# The one step upwards: the catalog makes the kernel table, which imports only specs and errors itself.
ALLOWED = {("plexor.extension.catalog", "plexor.kernels.table")}
# What runs before a model is chosen: these and all that they import at once must do without torch.
QUICK = ("plexor.api", "plexor.cli.plugins", "plexor.extension.catalog", "plexor.config", "plexor.__main__")


def python_files(folder: Path) -> list[Path]:
    """Every module below a folder, without what tools leave behind."""
    return sorted(
        path for path in folder.rglob("*.py") if "__pycache__" not in path.parts and ".build" not in path.parts
    )


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Absolute names that a module imports anywhere, constant `import_module` arguments included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            module = node.module or ""
            # `from plexor import errors` names a module too; `from plexor import hookimpl` does not.
            yield from (
                (f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module, node)
                for alias in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((str(argument.value), node) for argument in node.args if isinstance(argument, ast.Constant))


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the core."""
    parts = name.split(".")
    path = CORE.joinpath(*parts[1:])
    return parts[0] == "plexor" and (path.with_suffix(".py").is_file() or path.is_dir())


def type_checking_nodes(tree: ast.AST) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING`, which never run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def part_of(name: str) -> str:
    """The part of the core that a module belongs to, empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(("plexor", *parts)).removesuffix(".__init__")


def test_imports_are_seen_wherever_they_stand() -> None:
    source = (
        "import a.b\ndef f():\n    from plexor import errors, hookimpl\n    importlib.import_module('plexor_x.y')\n"
    )
    found = [name for name, _ in imports(ast.parse(source))]
    assert sorted(found) == ["a.b", "plexor", "plexor.errors", "plexor_x.y"]
    with pytest.raises(AssertionError, match="relative import in line 1"):
        list(imports(ast.parse("from . import x")))


def test_what_runs_at_import_is_told_from_types_and_functions() -> None:
    source = "if TYPE_CHECKING:\n    import a\nimport b\nclass C:\n    import c\ndef f():\n    import d\n"
    tree = ast.parse(source)
    running = set(module_level(tree)) - type_checking_nodes(tree)
    assert sorted(name for name, node in imports(tree) if node in running) == ["b", "c"]


@pytest.mark.parametrize("path", python_files(CORE), ids=module_name)
def test_a_core_module_keeps_the_order(path: Path) -> None:
    name = module_name(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = type_checking_nodes(tree)
    for imported, node in imports(tree):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {imported}"
        top = imported.split(".")[0]
        assert top != "core", f"{where}: the package is called plexor"
        assert not top.startswith("plexor_"), f"{where}: the core knows no plugin"
        if top != "plexor" or imported == "plexor" or node in only_types or name == "plexor":
            continue
        mine, theirs = part_of(name), part_of(imported)
        assert theirs in LAYERS, f"{where}: give {theirs} a place in LAYERS"
        allowed = mine == theirs or LAYERS[mine] > LAYERS[theirs] or (name, imported) in ALLOWED
        assert allowed, f"{where}: {mine} stands below {theirs}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_a_plugin_uses_only_the_doors(plugin: Path) -> None:
    own = f"plexor_{plugin.name}"
    for path in python_files(plugin):
        for imported, node in imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {imported}"
            top = imported.split(".")[0]
            assert top != "core", f"{where}: the package is called plexor"
            door = ".".join(imported.split(".")[:2])
            assert top != "plexor" or door in DOORS, f"{where}: only {', '.join(sorted(DOORS))} are for plugins"
            assert not top.startswith("plexor_") or top == own, f"{where}: plugins meet in the catalog only"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_a_plugin_module_imports_nothing_heavy(plugin: Path) -> None:
    path = plugin / f"plexor_{plugin.name}" / "plugin.py"
    heavy = {"torch", "triton", "numpy", "transformers", "PIL"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    running = set(module_level(tree)) - type_checking_nodes(tree)
    assert not {name for name, node in imports(tree) if node in running and name.split(".")[0] in heavy}


def imported_at_once(name: str) -> set[str]:
    """Names that a module of the core imports when it is imported, its packages included."""
    path = CORE.joinpath(*name.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    running = set(module_level(tree)) - type_checking_nodes(tree)
    return {imported for imported, node in imports(tree) if node in running} | {name.rpartition(".")[0]} - {""}


@pytest.mark.parametrize("start", QUICK)
def test_torch_is_not_imported_where_plugins_are_listed(start: str) -> None:
    pending, seen = [start], {start}
    while pending:
        name = pending.pop()
        for imported in imported_at_once(name) - seen:
            assert imported.split(".")[0] not in {"torch", "transformers"}, f"{name} imports {imported}"
            seen.add(imported)
            pending += [imported] if is_module(imported) or imported == "plexor" else []
    assert "plexor" in seen


def declared_names() -> set[str]:
    """Names of models, number formats and checkpoints that the known plugins declare."""
    names = set()
    for offers in json.loads((CORE / "extension" / "index.json").read_text(encoding="utf-8")).values():
        for hook in ("architectures", "precisions", "kv_formats", "checkpoints"):
            names |= set(offers.get(hook, ()))
    # A format may be called as the dtype that it keeps, which the core has to name.
    return (names | {family(name) for name in names}) - {"int8"}


def family(architecture: str) -> str:
    """The model's name in the name of its class: "SomeForCausalLM" is of the family "some"."""
    return re.sub(r"(For[A-Z].*|LMHeadModel|Model)$", "", architecture)


@pytest.mark.parametrize("path", python_files(CORE), ids=module_name)
def test_the_core_names_no_plugin_no_model_and_no_number_format(path: Path) -> None:
    source = path.read_text(encoding="utf-8").lower()
    # A declared name counts between any two characters that are not letters or digits: in "int3_linear" int3 is one.
    declared = [rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])" for name in sorted(declared_names())]
    plugins = [rf"\b{plugin.name}\b" for plugin in PLUGINS]
    said = [found.group() for pattern in (*declared, *plugins) if (found := re.search(pattern, source))]
    assert not said, f"{path.relative_to(ROOT)} says {said}"


@pytest.mark.parametrize("path", [*python_files(CORE), *(p for f in PLUGINS for p in python_files(f))], ids=str)
def test_environment_variables_are_read_in_one_place(path: Path) -> None:
    if path == CORE / "config.py" or "tests" in path.parts or "training" in path.parts:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    uses = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not uses, f"{path.relative_to(ROOT)} reads the environment in lines {uses}"


@pytest.mark.parametrize("path", [*python_files(CORE), *(p for f in PLUGINS for p in python_files(f))], ids=str)
def test_a_module_opens_with_its_duty(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(ROOT)} says nothing about itself"
