from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from pagemill import __version__
from pagemill.base.config import OPTIONS
from pagemill.cli.commands import app
from pagemill.cli.main import ACTIONS, _app_for, load_action, main
from tests.fixtures.program import COMMAND, environment, run_on_terminal, run_program

COMMANDS = [[], ["generate"], ["chat"], ["demo"], ["doctor"], ["models"], ["models", "show"], ["config"], ["bench"]]


def test_help_imports_neither_numpy_nor_a_web_framework() -> None:
    program = (
        "import sys\nfrom pagemill.cli.main import main\n"
        f"for command in {COMMANDS!r}:\n    assert main([*command, '--help']) == 0\n"
        "print([m for m in ('numpy', 'fastapi', 'pydantic', 'tokenizers', 'pagemill.llm') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    run_program("--help")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_program("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) <= 0.5


def test_every_command_of_the_table_can_be_loaded() -> None:
    assert all(callable(load_action(name)) for name in ACTIONS)


def test_a_command_alone_is_the_command_among_all(capsys: pytest.CaptureFixture[str]) -> None:
    """`main` leaves the others out where one is named first."""
    for command in (*COMMANDS[1:], ["bench", "peers"], ["top"], ["keys", "add"]):
        assert main([*command, "--help"]) == 0
        alone = capsys.readouterr().out
        get_command(app).main([*command, "--help"], prog_name="pagemill", standalone_mode=False, obj=load_action)
        assert alone == capsys.readouterr().out
    assert len(_app_for(["generate"]).registered_commands) == 1
    assert _app_for(["generat"]) is _app_for(["--help"]) is _app_for([]) is app


def test_every_engine_option_is_an_option_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    printed = capsys.readouterr().out
    assert [each.flag for each in OPTIONS.values() if each.flag[:20] not in printed] == []


def test_help_shows_brackets_and_defaults_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "[default: lru]" in printed
    assert "under [tenants] in" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pagemill {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate", "x"], "Did you mean 'generate'?"),
        (["models", "shwo", "x"], "Did you mean 'show'?"),
        (["generate", "x", "--max-token", "3"], "--max-tokens"),
        (["generate", "x", "--kv-cach", "none"], "--kv-cache"),
        (["config", "show", "--blok-size", "16"], "--block-size"),
        (["generate"], "Missing argument"),
        (["generate", "x", "--max-tokens", "many"], "'many' is not a valid int"),
        (["generate", "x", "--kv-cache", "pagd"], "did you mean paged?"),
        (["generate", "x", "--kv-cache-memory-bytes", "lots"], "512MiB"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens is 0; give at least 1"),
        (["generate", "x", "--min-tokens", "9", "--max-tokens", "3"], "min_tokens (9) is above max_tokens (3)"),
        (["generate", "x", "-n", "2"], "n is 2 with temperature 0"),
        (["generate", "x", "--logprobs", "21"], "logprobs is 21"),
        (["generate", "x", "--stop", ""], "stop holds what is empty"),
        (["generate", "x", "--model", "smollm2-135"], "smollm2-135m"),
        (["generate", "x", "--config", "/nowhere.toml"], "cannot read configuration file /nowhere.toml"),
        (["generate", "x", "--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "is below max_num_seqs"),
    ],
)
def test_a_mistake_is_one_line_that_says_how_to_mend_it(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_a_misspelt_variable_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_MAX_NUM_SEQ", "3")
    assert main(["config", "show"]) == 2
    assert "did you mean PAGEMILL_MAX_NUM_SEQS?" in capsys.readouterr().err


def test_debug_prints_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--debug", "--block-size", "3"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1].startswith("error: block_size is 3")


def test_a_mistake_of_ours_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.cli.config.json_schema", lambda: 1 / 0)
    assert main(["config", "schema"]) == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pagemill.cli.config.json_schema", interrupted)
    assert main(["config", "schema"]) == 130


@pytest.mark.parametrize("module", ["typer", "rich", "pagemill.cli.commands", "pagemill.cli.doctor", "numpy"])
def test_ctrl_c_while_modules_are_imported_exits_with_130(module: str) -> None:
    """Also where the import would have made another error of it."""
    program = f"""
import importlib.abc, os, signal, sys
class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except KeyboardInterrupt:
                raise ImportError("lost") from None
from pagemill.cli.main import run
sys.meta_path.insert(0, Interrupting())
sys.argv = ["pagemill", "doctor"]
run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_errors_are_red_on_a_terminal_only() -> None:
    wrong = ["config", "show", "--block-size", "3"]
    code, printed = run_on_terminal(*wrong)
    assert code == 2
    assert "\x1b[31merror:\x1b[0m block_size is 3" in printed
    assert "\x1b" not in run_on_terminal(*wrong, NO_COLOR="1")[1]
    assert b"\x1b" not in run_program(*wrong).stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "config", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_a_full_disk_under_the_output_is_a_named_error() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "config", "schema"], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the disk that the output goes to is full")
    assert done.stderr.count(b"\n") == 1


def test_closed_streams_are_no_error() -> None:
    script = f"{shlex.join(COMMAND)} config show <&- >&-"
    done = subprocess.run(["bash", "-c", script], stderr=subprocess.PIPE, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_the_terminals_encoding_lacks_is_replaced_and_json_escaped() -> None:
    program = "import sys; from pagemill.cli.terminal import prepare_streams, print_json; prepare_streams(); "
    program += "print('caf\\xe9 \\u2192'); print_json({'text': '\\u65e5'})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(PYTHONIOENCODING="ascii"), timeout=60
    )
    assert done.stdout == b'caf? ?\n{"text": "\\u65e5"}\n'


def test_config_show_tells_where_a_value_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_MAX_MODEL_LEN", "2K")
    assert main(["config", "show", "--block-size", "32", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["block_size"] == {"value": 32, "origin": "command line", "unit": "tokens"}
    assert shown["max_model_len"] == {"value": 2048, "origin": "PAGEMILL_MAX_MODEL_LEN", "unit": "tokens"}
    assert shown["dtype"]["origin"] == "default"
    assert main(["config", "show", "--block-size", "32"]) == 0
    assert "PAGEMILL_MAX_MODEL_LEN" in capsys.readouterr().out


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == {*OPTIONS, "tenants"}
