"""Sizes of files and functions, calls that are not allowed anywhere, and how much the package depends on."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from tests.fixtures.forbidden_calls import TESTS_MAY, forbidden_in

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "pagemill"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_DEPENDENCIES = 15
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
NATIVE = sorted(path for ending in ("*.h", "*.cpp", "*.c") for path in (ROOT / "csrc").rglob(ending))

FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def test_files_stay_within_their_budget() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*SOURCES, *NATIVE]
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_python_functions_stay_within_their_budget() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                lines = (node.end_lineno or first) - first + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{first}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_nothing_unpickles_evaluates_or_runs_a_shell() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{what}"
        for path in SOURCES
        for what in forbidden_in(path.read_text(), () if path.is_relative_to(PACKAGE) else TESTS_MAY)
    ]
    assert not found, "\n".join(found)


def test_the_search_for_forbidden_calls_finds_each_of_them() -> None:
    source = (
        "import pickle\nfrom marshal import loads\neval('1')\nexec('')\nimport os\nos.system('ls')\n"
        "subprocess.run('ls', shell=True)\nnp.load('x', allow_pickle=True)\nsubprocess.run('ls', shell=False)\n"
        "os.execvp('ls', [])\ncompile('1', 'x', 'eval')\nre.compile('x')\n"
    )
    assert [what.split(":")[0] for what in forbidden_in(source)] == ["1", "2", "3", "4", "6", "7", "8", "10", "11"]


def test_no_file_is_called_utils_or_the_like() -> None:
    assert not [
        path for path in [*SOURCES, *NATIVE] if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES
    ]


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not silent


def test_core_dependencies_are_few_and_without_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^A-Za-z0-9_-]", line, maxsplit=1)[0].lower() for line in project["dependencies"]]
    assert len(names) <= MAX_DEPENDENCIES
    assert not {"torch", "transformers", "tensorflow", "jax"} & set(names)


def test_the_version_is_the_same_in_both_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'__version__ = "{project["version"]}"' in (PACKAGE / "__init__.py").read_text()
