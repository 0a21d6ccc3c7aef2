"""Entry point of `pagemill`: the lazy command table, exit codes, and errors as one line.

Exit codes: 0 done, 2 the user's error, 1 ours, 130 interrupted. Little is imported here: what takes longer, the parser
of the command line too, is imported where Ctrl-C ends the program without a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from pagemill import __version__
from pagemill.base.errors import PagemillError
from pagemill.cli.terminal import prepare_streams, print_error, silence_stdout

if TYPE_CHECKING:
    import typer

# What each command runs: module and function, imported when the command is used and not before.
ACTIONS: dict[str, tuple[str, str]] = {
    "demo": ("pagemill.cli.demo", "run"),
    "generate": ("pagemill.cli.generate", "run"),
    "chat": ("pagemill.cli.chat", "run"),
    "serve": ("pagemill.cli.serve", "run"),
    "doctor": ("pagemill.cli.doctor", "run"),
    "simulate": ("pagemill.cli.simulate", "run"),
    "simulate.serve": ("pagemill.cli.simulate_serve", "serve_trace"),
    "bench.kvcache": ("pagemill.cli.kvcache_beside", "kvcache"),
    "bench.quality": ("pagemill.cli.quality", "quality"),
    "bench.peers": ("pagemill.cli.peers", "peers"),
    "bench.roofline": ("pagemill.cli.roofline", "roofline"),
    "bench.growth": ("pagemill.cli.growth", "growth"),
    "bench.cache": ("pagemill.cli.cache_bench", "cache"),
    "bench.serve": ("pagemill.cli.serve_bench", "serve"),
    "bench.step": ("pagemill.cli.step_profile", "step"),
    "cache.stats": ("pagemill.cli.cache_stats", "stats"),
    "cache.ls": ("pagemill.cli.cache_remote", "ls"),
    "cache.tree": ("pagemill.cli.cache_remote", "tree"),
    "cache.purge": ("pagemill.cli.cache_remote", "purge"),
    "cache.pin": ("pagemill.cli.cache_remote", "pin"),
    "cache.unpin": ("pagemill.cli.cache_remote", "unpin"),
    "top": ("pagemill.cli.top", "run"),
    "keys.add": ("pagemill.cli.keys", "add"),
    "keys.ls": ("pagemill.cli.keys", "ls"),
    "keys.rm": ("pagemill.cli.keys", "rm"),
    "models.pull": ("pagemill.cli.models", "pull_model"),
    "models.ls": ("pagemill.cli.models", "list_local"),
    "models.rm": ("pagemill.cli.models", "remove_model"),
    "models.show": ("pagemill.cli.models", "show_model"),
    "config.show": ("pagemill.cli.config", "show"),
    "config.schema": ("pagemill.cli.config", "schema"),
}

INTERRUPTED = 130


def load_action(name: str) -> Callable[..., int | None]:
    """The function that a command runs, its module imported now."""
    module, function = ACTIONS[name]
    with _ends_at_ctrl_c():
        action: Callable[..., int | None] = getattr(import_module(module), function)
    return action


def main(arguments: list[str]) -> int:
    """Run one command line. Returns the exit code; prints errors as one line on stderr, a traceback with --debug."""
    arguments, debug = _take_flag(arguments, "--debug")
    debug = debug or os.environ.get("PAGEMILL_DEBUG", "") not in ("", "0")
    if "--version" in arguments[:1]:
        print(f"pagemill {__version__}")
        return 0
    try:
        with _ends_at_ctrl_c():
            from typer.main import get_command

            command = get_command(_app_for(arguments))
        code = command.main(arguments, prog_name="pagemill", standalone_mode=False, obj=load_action)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return 0
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error)
    return code if isinstance(code, int) else 0


def run() -> None:
    """The `pagemill` program."""
    try:
        prepare_streams()
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


@contextmanager
def _ends_at_ctrl_c() -> Iterator[None]:
    """While modules are imported, and nothing has been done yet, Ctrl-C ends the program at once: as an exception it
    may be lost, or become another one, within the initialisation of a native module."""
    default = signal.default_int_handler
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def _app_for(arguments: list[str]) -> typer.Typer:
    """The command that is named first, without the others, whose options typer would go through on every start; the
    whole app where none is."""
    from typer.main import get_command_name

    from pagemill.cli.commands import app

    name = arguments[0] if arguments else ""
    commands = [
        each
        for each in app.registered_commands
        if each.callback is not None and name == (each.name or get_command_name(each.callback.__name__))
    ]
    groups = [each for each in app.registered_groups if each.name == name]
    if not commands and not groups:
        return app
    narrow = copy(app)
    narrow.registered_commands, narrow.registered_groups = commands, groups
    return narrow


def _take_flag(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if flag not in arguments[:end]:
        return arguments, False
    return [each for each in arguments[:end] if each != flag] + arguments[end:], True


def _report(error: Exception) -> int:
    if isinstance(error, PagemillError):
        print_error(str(error))
        return error.exit_code
    if isinstance(error, MemoryError):
        print_error("out of memory; lower kv_cache_memory_bytes or max_model_len, or take a smaller model")
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        silence_stdout()
        print_error(f"the disk that the output goes to is full ({error}); free some room, or write elsewhere")
        return 2
    if isinstance(error, ImportError) and "_native" in f"{error.name} {error}":
        print_error(f"the native core is missing or broken ({error}); build it with `pip install .` in the checkout")
        return 1
    import typer

    # The parser's own error: typer carries its copy of click, so the class is reached through typer.
    if isinstance(error, next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")):
        return _report_usage(error)
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    print_error(f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback, and report it)")
    return 1


def _report_usage(error: Any) -> int:
    ctx = getattr(error, "ctx", None)
    message = str(error.format_message()).strip().rstrip(".")
    if message:  # a group without a command has none: its help, printed already, is the answer
        hint = f"; see `{ctx.command_path} --help`" if ctx is not None else ""
        print_error(f"{message}{hint}")
    return int(error.exit_code)
