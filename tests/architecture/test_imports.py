"""The import table of docs/architecture.md, over the whole package, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "pagemill"

LOWER = {"base", "cache", "text", "planner", "telemetry", "kernels", "engine", "storage", "models", "decoding"}
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "cache": {"base"},
    "planner": {"base"},
    "telemetry": {"base"},
    "text": {"base"},
    "kernels": {"base"},
    "engine": {"base", "cache", "telemetry", "text"},
    "storage": {"base", "kernels"},
    "models": {"base", "kernels"},
    "decoding": {"base", "kernels", "text"},
    "simulator": {"base", "cache", "engine", "planner"},
    "execution": {"base", "kernels", "storage", "models", "decoding", "telemetry"},
    "server": {"base", "engine", "text", "telemetry"},
    "dashboard": {"base", "engine", "telemetry"},
    "build": LOWER | {"execution"},
    "llm": {"base", "engine", "text", "build"},
    "cli": LOWER | {"execution", "simulator", "server", "dashboard", "build", "llm", "bench", ""},
    "bench": LOWER | {"execution", "simulator", "server", "dashboard", "build", "llm", ""},
    "__main__": {"cli"},
    "deploy": LOWER | {"execution", "simulator", "server", "dashboard", "build", "llm", ""},
}
# Files whose imports are not edges: the lazy command table and the lazy re-export (PEP 562).
LAZY = {"cli/main.py", "__init__.py"}
STANDARD_ONLY = {"base", "cache", "engine", "planner", "simulator"}
# The files that bring a library into a control-plane unit; nothing in the control plane may import them.
LIBRARY_DOORS = {"pagemill.text.tokenizer", "pagemill.telemetry.export", "pagemill.telemetry.otlp"}
CONTROL_PLANE = {"base", "cache", "engine", "planner", "simulator", "text", "telemetry"}
STANDARD_FILES = ["text/stream.py", "text/stop.py"]

FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """`pagemill.cache.pool` -> "cache"; `pagemill` itself -> ""."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of every import statement, wherever it stands; `from a import b` gives a.b and a."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def wrong_edges(path: Path) -> list[str]:
    module = module_of(path)
    unit = unit_of(module)
    wrong = []
    for line, name in imported_modules(path.read_text(), module, is_package=path.name == "__init__.py"):
        if name.split(".")[0] != "pagemill":
            continue
        target = unit_of(name)
        if target in ("__version__",):
            target = ""
        if target != unit and target not in ALLOWED.get(unit, set()):
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {unit or 'pagemill'} imports {name}")
    return wrong


def test_every_unit_is_in_the_table() -> None:
    units = {unit_of(module_of(path)) for path in FILES} - {""}
    assert units <= ALLOWED.keys()


def test_units_import_only_what_the_table_allows() -> None:
    wrong = [edge for path in FILES if str(path.relative_to(PACKAGE)) not in LAZY for edge in wrong_edges(path)]
    assert not wrong, "\n".join(wrong)


def test_a_forbidden_edge_inside_a_function_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pagemill"
    (package / "cache").mkdir(parents=True)
    bad = package / "cache" / "pool.py"
    bad.write_text("def f():\n    from ..models import gguf\n    import pagemill.kernels.ops\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(wrong_edges(bad)) == 2


def test_dynamic_imports_stand_only_in_the_two_lazy_tables() -> None:
    wrong = []
    for path in FILES:
        if str(path.relative_to(PACKAGE)) in LAZY:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("import_module", "__import__"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_control_plane_does_not_reach_for_the_library_doors() -> None:
    wrong = []
    for path in FILES:
        module = module_of(path)
        if unit_of(module) not in CONTROL_PLANE or module in LIBRARY_DOORS:
            continue
        for line, name in imported_modules(path.read_text(), module, is_package=path.name == "__init__.py"):
            if any(name == door or name.startswith(door + ".") for door in LIBRARY_DOORS):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


REFUSING_IMPORTER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root != "pagemill" and root not in sys.stdlib_module_names:
            raise ImportError(f"{name} is not in the standard library")
        return None
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, SOURCE)
import importlib
for module in MODULES:
    importlib.import_module(module)
"""


def import_refusing(modules: list[str]) -> subprocess.CompletedProcess[str]:
    program = REFUSING_IMPORTER.replace("SOURCE", repr(str(PACKAGE.parent))).replace("MODULES", repr(modules))
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)


def test_control_plane_units_import_with_the_standard_library_alone() -> None:
    modules = [module_of(path) for path in FILES if unit_of(module_of(path)) in STANDARD_ONLY]
    modules += [f"pagemill.{name[:-3].replace('/', '.')}" for name in STANDARD_FILES]
    for unit in sorted({unit_of(module) for module in modules}):
        done = import_refusing([module for module in modules if unit_of(module) == unit])
        assert done.returncode == 0, f"{unit}: {done.stderr}"


def test_the_refusing_importer_refuses_numpy() -> None:
    done = import_refusing(["numpy"])
    assert done.returncode != 0
    assert "numpy is not in the standard library" in done.stderr


def test_numpy_enters_no_unit_below_kernels() -> None:
    for path in FILES:
        if unit_of(module_of(path)) in CONTROL_PLANE:
            names = {
                name.split(".")[0]
                for _, name in imported_modules(
                    path.read_text(), module_of(path), is_package=path.name == "__init__.py"
                )
            }
            assert "numpy" not in names, path
