"""Make docs/commands.md from the code: every command, option, default, variable and the configuration file.

    python scripts/make_command_reference.py            write docs/commands.md
    python scripts/make_command_reference.py --check    exit 1 where the file is not what would be written

Owns the page's layout. What it says of a command is declared in `pagemill/cli/commands.py`, of an engine option in
`pagemill/base/config.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))  # where it is not installed

from typer.main import get_command  # noqa: E402

from pagemill.base.config import CONFIG_VARIABLE, OPTIONS, OTHER_VARIABLES, Option  # noqa: E402
from pagemill.base.units import format_bytes  # noqa: E402
from pagemill.cli.chat import HELP as CHAT_HELP  # noqa: E402
from pagemill.cli.commands import app  # noqa: E402
from pagemill.cli.main import INTERRUPTED  # noqa: E402

PAGE = ROOT / "docs" / "commands.md"
HEADING = """\
# Commands and options

This page is generated from the code by `scripts/make_command_reference.py`; change the code, not the page.

Results go to stdout, remarks, progress and errors to stderr. Colour is used on a terminal only, and not where
`NO_COLOR` is set. `--json` prints one JSON object to stdout and nothing else. `-h` or `--help` after any command
explains it. A misspelt option is refused, with the nearest name.
"""


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group that does something, with the words that call it, in the order of the help."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from commands(child, (*path, name))


def section(path: tuple[str, ...], command: Any) -> str:
    """One command: usage, what it does, its own arguments and options."""
    takes_engine_options = set(OPTIONS) <= {each.name for each in command.params}
    engine = {*OPTIONS, "config"} if takes_engine_options else set()
    own = [each for each in command.params if each.name not in engine]
    arguments = "".join(f" {each.name.upper()}" for each in own if each.param_type_name == "argument")
    lines = [f"## {' '.join(path)}", "", f"`{' '.join(path)}{arguments}{' [options]' if command.params else ''}`", ""]
    lines += [command.help.strip(), ""]
    if own:
        lines += ["| argument or option | default | what it is |", "|---|---|---|"]
        lines += [_parameter_row(each) for each in own]
        lines.append("")
    if takes_engine_options:
        lines += ["Takes the [engine options](#engine-options) as well.", ""]
    if path[-1] == "chat":
        lines += ["What can be typed in a conversation:", "", "```text", CHAT_HELP, "```", ""]
    return "\n".join(lines)


def _parameter_row(each: Any) -> str:
    if each.param_type_name == "argument":
        return _row(f"`{each.name.upper()}`", "required" if each.required else _default(each), each.help)
    value = "" if each.is_flag else f" {each.metavar or each.type.name.upper()}"
    names = ", ".join(f"`{name}`" for name in sorted(each.opts, key=len, reverse=True))
    text = f"{each.help} May be repeated." if each.multiple and "several times" not in each.help else each.help
    return _row(
        f"{names}{f' `{value.strip()}`' if value else ''}", "required" if each.required else _default(each), text
    )


def _default(each: Any) -> str:
    if getattr(each, "is_flag", False):
        return "off"
    return "" if each.default in (None, "") else f"`{each.default}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def engine_options() -> str:
    """The table of EngineConfig's fields."""
    lines = [
        "## Engine options",
        "",
        "Taken by every command that loads a model, by `LLM(...)` in Python under the name of the variable's ending in",
        "lower case (`max_model_len=2048`), by the environment, and by a configuration file.",
        "",
        "| option | variable | default | what it is |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_option_row(each) for each in OPTIONS.values()), ""])


def _option_row(each: Option) -> str:
    value = " or ".join(f"`{choice}`" for choice in each.choices)
    text = f"{each.help} {f'Values: {value}.' if value else f'Unit: {each.unit}.' if each.unit else ''}"
    return _row(f"`{each.flag}`", f"`{each.variable}`", "unset" if each.default is None else f"`{each.default}`", text)


def configuration() -> str:
    """Where options come from: precedence, the file, sizes, other variables, exit codes."""
    lines = [
        f"Sizes read `512MiB`, `2GiB`, `1k` (1,000) or `1K` (1,024); Pagemill prints them as `{format_bytes(2**29)}`.",
        "",
        "### Configuration file",
        "",
        f"A TOML file, named by `--config FILE` or by `{CONFIG_VARIABLE}`, whose keys are the options' names.",
        "Precedence: command line (or Python argument), then environment, then file, then default.",
        "`pagemill config show` prints the values in force and where each came from; `pagemill config schema` prints a",
        "JSON schema of the file.",
        "",
        "```toml",
        'model = "smollm2-135m"',
        "max_model_len = 2048",
        'kv_cache_memory_bytes = "256MiB"',
        "num_threads = 2",
        "```",
        "",
        "### Other environment variables",
        "",
        "| variable | what it is |",
        "|---|---|",
        *(_row(f"`{name}`", text) for name, text in sorted(OTHER_VARIABLES.items())),
        "",
        "An unknown variable that begins with `PAGEMILL_` is refused, so that a misspelt one is noticed.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        _row("0", "done"),
        _row(
            "2", "a mistake in the command, the model, the request or the room given; the message says how to mend it"
        ),
        _row("1", "a mistake of Pagemill's; `--debug` prints the whole traceback"),
        _row(str(INTERRUPTED), "interrupted by Ctrl-C"),
    ]
    return "\n".join(lines)


def everywhere(program: Any) -> str:
    """The options of the program itself."""
    lines = ["## Options of the program", "", "| option | default | what it is |", "|---|---|---|"]
    return "\n".join([*lines, *(_parameter_row(each) for each in program.params), ""])


def render() -> str:
    """The whole page."""
    program = get_command(app)
    found = list(commands(program, ("pagemill",)))
    index = [f"* [`{' '.join(path)}`](#{'-'.join(path)}) {_first_sentence(command.help)}" for path, command in found]
    sections = [section(path, command) for path, command in found]
    return "\n".join([HEADING, *index, "", *sections, everywhere(program), engine_options(), configuration(), ""])


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?=\s|$)", text.strip())[0]


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of date")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/make_command_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
