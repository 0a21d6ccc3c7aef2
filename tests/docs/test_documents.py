"""README and docs stay true: what they show is run, what is not run is marked and counted, links lead somewhere.

How blocks are run and what is changed before is told in docs/README.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.make_command_reference import PAGE, render

from pagemill.base.config import resolve_config
from tests.architecture.test_imports import ALLOWED, PACKAGE
from tests.fixtures.default_model import default_model_path
from tests.fixtures.markdown import (
    MARK,
    Block,
    Command,
    anchors_of,
    blocks_of,
    commands_of,
    file_names_of,
    links_of,
    lowered,
    prose_of,
    shows,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCKS = [block for page in PAGES for block in blocks_of(page)]

# Blocks that say "not run in CI", page by page. A new one needs a reason above it and a change here.
NOT_RUN = {
    "README.md": 1,
    "docs/adding-a-model.md": 1,
    "docs/quickstart.md": 2,
    "docs/performance.md": 3,
    "docs/serve.md": 5,
    "docs/security.md": 1,
    "docs/observe.md": 1,
    "docs/cache.md": 2,
}
RUN = ("console", "bash", "python")
READ = ("toml", "json")
INERT = ("text",)

# Commands that a test must not run.
UNFIT = re.compile(r"(?m)(?:^|[;&|(]\s*)(?:sudo|make|git|pip|uv|python -m (?:pip|venv)|rm|source|\.)\s")

# Options of the person who runs the tests do not reach the documents' commands, but for these.
KEPT_VARIABLES = ("PAGEMILL_HOME", "PAGEMILL_FORCE_TARGET")
DEFAULTS = {
    "PAGEMILL_KV_CACHE_MEMORY_BYTES": "512MiB",
    "PAGEMILL_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "100",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def at(block: Block) -> str:
    return f"{name_of(block.page)}:{block.line}"


def to_run(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and block.reason is None]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a reader's shell: `pagemill` and `python` on the path, the default model on the machine."""
    default_model_path()
    programs = tmp_path_factory.mktemp("bin")
    for name, arguments in (("pagemill", "-m pagemill "), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        program.chmod(0o755)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PAGEMILL_") or k in KEPT_VARIABLES}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return variables | DEFAULTS | {"PATH": path, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory that looks like the checkout and may be written to."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def run(arguments: list[str], directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; stdout holds both streams."""
    return subprocess.run(
        arguments,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def run_shell(script: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script in bash, unless it would change the machine or run the tests within the tests."""
    assert not UNFIT.search(script), f"mark this block as not run in CI: {script}"
    return run(["bash", "-o", "pipefail", "-c", script], directory, environment)


def check_command(command: Command, directory: Path, environment: dict[str, str]) -> None:
    """Run one command of a console block; its output is compared unless one of its numbers was lowered."""
    script = lowered(command.text)
    done = run_shell(script, directory, environment)
    assert done.returncode == 0, f"$ {script}\n{done.stdout}"
    if script == command.text:
        assert shows(command.output, done.stdout), f"$ {script}\nprinted:\n{done.stdout}\nshown:\n{command.output}"


@pytest.mark.model
@pytest.mark.parametrize("block", to_run("console"), ids=at)
def test_console_block_prints_what_it_shows(block: Block, checkout: Path, environment: dict[str, str]) -> None:
    commands = commands_of(block)
    assert commands, 'a console block needs a line that begins with "$ "'
    for command in commands:
        check_command(command, checkout, environment)


@pytest.mark.model
@pytest.mark.parametrize("block", to_run("bash"), ids=at)
def test_bash_block_ends_well(block: Block, checkout: Path, environment: dict[str, str]) -> None:
    done = run_shell("set -e\n" + lowered(block.text), checkout, environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.model
@pytest.mark.parametrize("page", sorted({block.page for block in to_run("python")}), ids=name_of)
def test_python_blocks_of_a_page_run_in_order(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    lines: list[str] = []
    for block in to_run("python"):
        if block.page == page:  # at the page's own line numbers, so that a traceback names them
            lines += [""] * (block.line - len(lines)) + lowered(block.text).splitlines()
    program = checkout / "page.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run(["python", str(program)], checkout, environment)
    assert done.returncode == 0, f"line numbers are those of {name_of(page)}\n{done.stdout}"


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example: Path, checkout: Path, environment: dict[str, str]) -> None:
    done = run(["python", str(checkout / name_of(example))], checkout, environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip()


@pytest.mark.parametrize("block", to_run("toml"), ids=at)
def test_toml_block_is_a_configuration_file(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "pagemill.toml"
    path.write_text(block.text, encoding="utf-8")
    assert f"file {path}" in resolve_config({}, environ={}, file=path).origins.values()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    blocks = blocks_of(page)
    unknown = [f"{at(block)}: {block.language!r}" for block in blocks if block.language not in RUN + READ + INERT]
    assert not unknown, f"blocks of an unknown language; use one of {', '.join(RUN + READ + INERT)}"
    needless = [at(block) for block in blocks if block.reason is not None and block.language not in RUN]
    assert not needless, "marks on blocks that are never run"
    marks = sum(block.reason is not None for block in blocks)
    assert sum(MARK.fullmatch(line.strip()) is not None for line in prose_of(page).splitlines()) == marks, (
        "a mark must stand in the line right above its block"
    )
    assert marks == NOT_RUN.get(name_of(page), 0), "run the block, or give the reason and change NOT_RUN"
    for block in blocks:
        if block.language == "json" and block.reason is None:
            json.loads(block.text)


def test_make_targets_that_are_shown_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        (at(block), target)
        for block in BLOCKS
        if block.language in ("bash", "console")
        for target in re.findall(r"\bmake ([a-z-]+)", block.text)
    }
    assert not {where for where, target in shown if target not in known}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in links_of(page):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    places = (ROOT, PACKAGE, PACKAGE.parent)
    missing = [name for name in file_names_of(page) if not any((place / name).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_claims_a_registry(page: Path) -> None:
    assert not re.search(r"pip install ['\"]?pagemill", page.read_text(encoding="utf-8"))


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    reached = {(index.parent / target).resolve() for target in links_of(index)}
    assert {page for page in PAGES[1:] if page != index} <= reached


def test_command_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python scripts/make_command_reference.py"


def test_table_of_imports_is_the_one_that_is_enforced() -> None:
    units = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    page = prose_of(ROOT / "docs" / "architecture.md")
    table = page.partition("## What may import what\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[a-z`, ]+`) \|[^|]*\| ([^|]*) \|$", table, re.MULTILINE)
    shown = {
        unit: set(re.findall(r"`(\w+)`", allowed))
        for named, allowed in rows
        for unit in re.findall(r"\w+", named)
        if allowed != "anything below"
    }
    assert shown == {unit: ALLOWED[unit] & units for unit in units & ALLOWED.keys() - {"cli", "bench", "__main__"}}


@pytest.mark.parametrize("page", DECISIONS, ids=name_of)
def test_decisions_have_one_form(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    number, _, title = page.stem.partition("-")
    assert int(number) == DECISIONS.index(page) + 1, "decisions are numbered without gaps"
    assert title
    assert lines[0].startswith(f"# {number} ")
    assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequence"]
    assert len(lines) <= 60, "a decision is one page"


def page_with(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_marks_count_only_right_above_their_block(tmp_path: Path) -> None:
    text = "*not run in CI: slow*\n```bash\na\n```\n*not run in CI: slow*\n\n```bash\nb\n```\n```\nc\n```\n"
    found = blocks_of(page_with(tmp_path, text))
    assert [(b.line, b.language, b.text, b.reason) for b in found] == [
        (2, "bash", "a\n", "slow"),
        (7, "bash", "b\n", None),
        (10, "", "c\n", None),
    ]


def test_block_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:2: the block is not closed"):
        blocks_of(page_with(tmp_path, "text\n```bash\na\n"))


def test_console_block_is_read_as_commands_with_their_output(tmp_path: Path) -> None:
    text = "```console\n$ a \\\n  b\none\n\ntwo\n$ c\n```\n"
    [block] = blocks_of(page_with(tmp_path, text))
    assert commands_of(block) == [Command("a \\\n  b", "one\n\ntwo"), Command("c", "")]


def test_failing_command_and_wrong_output_are_found(tmp_path: Path) -> None:
    environment = dict(os.environ)
    check_command(Command("echo one; echo two", "one\n…"), tmp_path, environment)
    check_command(Command("echo --tokens 200", "lowered, hence not compared"), tmp_path, environment)
    with pytest.raises(AssertionError, match="shown:"):
        check_command(Command("echo one", "two"), tmp_path, environment)
    with pytest.raises(AssertionError, match="false"):
        check_command(Command("false | true", ""), tmp_path, environment)


@pytest.mark.parametrize("script", ["make test", "echo a && make demo", "git clone x", "a\npip install x", "rm -r x"])
def test_commands_that_change_the_machine_are_never_run(script: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="mark this block"):
        run_shell(script, tmp_path, dict(os.environ))


def test_words_within_a_command_are_no_commands(tmp_path: Path) -> None:
    assert run_shell("echo we make bread, git pip rm", tmp_path, dict(os.environ)).returncode == 0


def test_only_larger_numbers_are_lowered() -> None:
    assert lowered("x --max-tokens 200 --tokens=1000 --runs 5 --runs-without 2") == (
        "x --max-tokens 32 --tokens=16 --runs 1 --runs-without 1"
    )
    assert lowered("SamplingParams(max_tokens=1000, min_tokens=8)") == "SamplingParams(max_tokens=32, min_tokens=8)"
    assert lowered("x --max-tokens 8 --max-num-batched-tokens 4096") == "x --max-tokens 8 --max-num-batched-tokens 4096"


def test_ellipsis_stands_for_anything() -> None:
    assert shows("a … b\n…", "a 1\n2 b\nmore  \n")
    assert shows("", "\n")
    assert not shows("a", "a b")
    assert not shows("…x", "abc")
