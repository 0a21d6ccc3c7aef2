"""S14: the search in the source finds every form that it forbids, and the audit hook reports every event it watches."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.fixtures.audit_server import WATCHED
from tests.fixtures.forbidden_calls import TESTS_MAY, forbidden_in
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.fixtures.watched_server import audit_reports, watched_server

FORMS = (
    # A module that unpickles, or runs text.
    "import pickle", "import _pickle", "import cPickle as p", "from pickle import loads",
    "from _pickle import Unpickler",
    "import marshal", "import shelve", "import dill", "import cloudpickle", "import joblib", "from joblib import load",
    "import multiprocessing", "import multiprocessing.pool as m", "from multiprocessing import Pool",
    "from concurrent.futures import ProcessPoolExecutor", "import concurrent.futures.process",
    "import concurrent.futures as f; f.ProcessPoolExecutor()", "from concurrent import futures; futures.process",
    "import pty", "from pty import spawn", "import runpy", "import code", "import timeit", "from logging import config",
    "import builtins", "import posix; posix.system('ls')", "from os import path, system",
    # By name, from wherever.
    "import importlib; importlib.import_module('pickle')",
    "from importlib import import_module as i; i('_pi' + 'ckle')",
    "__import__('pickle')", "import importlib; importlib.import_module(name='pickle')", "__import__(name='pickle')",
    "import sys; sys.modules['pickle']", "import sys; sys.modules['os'].system('ls')",
    "from importlib import import_module\nfor name in names: import_module(name)",
    "from importlib import import_module\nhome = 'pickle'\nimport_module(home)",
    # Text that runs.
    "eval('1')", "exec('')", "compile('1', 'x', 'eval')", "run = eval", "list(map(eval, texts))",
    "getattr(__builtins__, 'eval')('1')", "__builtins__['eval']('1')", "globals()['__builtins__']",
    "import sys; sys.modules['builtins'].eval", "().__class__.__base__.__subclasses__()",
    "from types import CodeType", "import types as t\nt.FunctionType(code, {})",
    # A shell.
    "import os\nos.system('ls')", "import os as o\no.system('ls')", "from os import system as s", "from os import *",
    "import os\nrun = os.system", "import os\nmine = os\nmine.popen('ls')", "import os\ngetattr(os, 'system')('ls')",
    "import os\ngetattr(os, 'sys' + 'tem')('ls')", "import os\ngetattr(os, name)('ls')",
    "import os\nvars(os)['system']",
    "import os\nos.__dict__['system']", "import os\nos.__dict__[name]", "import os\nos.execvp('ls', [])",
    "from os import spawnlp", "import os\nos.posix_spawn('/bin/ls', [], {})", "import os\nos.fork()",
    "from operator import attrgetter\nattrgetter('system')", "import operator\noperator.methodcaller('spawnv', 0)",
    "from subprocess import getoutput", "import subprocess as s\ns.getstatusoutput('ls')",
    "import subprocess\nsubprocess.run('ls', shell=True)", "import subprocess\nsubprocess.run('ls', shell=maybe)",
    "import subprocess\nsubprocess.run(['sh', '-c', 'ls'])",
    "from subprocess import Popen\nPopen(('/bin/bash', '-lc', x))",
    "command = ['env', 'sh', '-c', text]", "import subprocess\nsubprocess.call('bash')",
    "import subprocess\nsubprocess.run(['x'], executable='/bin/sh')",
    "import subprocess\nsubprocess.Popen('ls', -1, None, None, None, None, None, True, True)",
    "import sys\ncommand = [sys.executable, '-c', text]", "command = ['python3', '-P', '-c', text]",
    "import asyncio\nasyncio.create_subprocess_exec('sh', '-c', text)", "from asyncio import create_subprocess_shell",
    "import asyncio\nasyncio.subprocess.create_subprocess_shell('ls')", "loop.subprocess_shell(protocol, 'ls')",
    # Arrays that hold pickles.
    "np.load('x', allow_pickle=True)", "import numpy as np\nnp.load(f, None, True)",
    "from numpy import load\nload(f, None, maybe)", "import numpy\nnumpy.load(*arguments)",
    "import numpy as np\nnp.load(f, **options)", "import numpy as np\nnp.save(f, rows)",
    "from numpy.lib.format import read_array\nread_array(f, True)", "import torch\ntorch.load(f)",
    "frame.to_pickle(f)", "import ctypes\nctypes.CDLL(None).system(b'ls')",
)  # fmt: skip
ALLOWED = (
    "import re\nre.compile('x')", "import subprocess\nsubprocess.run(['ls'], shell=False)", "session.fork()",
    "import numpy as np\nnp.load(f, None, False)", "import numpy as np\nnp.save(f, rows, allow_pickle=False)",
    "from concurrent.futures import ThreadPoolExecutor", "import os\nos.environ['PATH']",
    "import os\ngetattr(os, 'nice')",
    "import ast\nast.literal_eval('1')", "from importlib import metadata", "languages = ('bash', 'console')",
    "from importlib import import_module\nhome = 'json'\nimport_module(home)", "from .code import name",
    "self.code.run()",
)  # fmt: skip

# What does it, in a server's process, by event. Windows' interpreters alone tell os.spawn: it is told for them.
DOES = {
    "pickle.find_class": "import pickle; pickle.loads(b'cbuiltins\\nlist\\n.')",
    "marshal.loads": "import marshal; marshal.loads(b'N')",
    "exec": "exec(compile('1', 'x', 'exec'))",
    "compile": "compile('1', 'x', 'exec')",
    "os.system": "import os; os.system('true')",
    "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
    "os.exec": "import os; os.execv('/is/not/there', ['x'])",
    "os.spawn": "import sys; sys.audit('os.spawn', 0, 'x', ['x'], {})",
    "os.posix_spawn": "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "os.fork": "import os; pid = os.fork() or os._exit(0); os.waitpid(pid, 0)",
    "os.forkpty": "import sys; sys.audit('os.forkpty')",
    "pty.spawn": "import sys; sys.audit('pty.spawn', ['x'])",
}
_PATCH = """
from contextlib import suppress
from pagemill.server import asking
before = asking.cache_of

def cache_of(body, *rest):
    with suppress(OSError):
        {branches}
    return before(body, *rest)

asking.cache_of = cache_of
"""


@pytest.mark.parametrize("source", FORMS)
def test_the_search_finds_each_form(source: str) -> None:
    assert forbidden_in(source)


@pytest.mark.parametrize("source", ALLOWED)
def test_the_search_leaves_alone_what_does_none_of_it(source: str) -> None:
    assert forbidden_in(source) == []


def test_a_finding_tells_its_line_and_what_it_is() -> None:
    source = "import os as o\nimport subprocess\n\no.system('ls')\nsubprocess.run(['sh', '-c', 'ls'])\n"
    assert forbidden_in(source) == ["4: os.system", "5: a shell"]
    assert forbidden_in(source, TESTS_MAY) == ["4: os.system"]


@pytest.fixture(scope="module")
def doing(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProcess]:
    """A server under watch whose product does what the field `user` names."""
    place = tmp_path_factory.mktemp("doing")
    branches = "\n        ".join(f"if body.user == {event!r}: {does}" for event, does in DOES.items())
    (place / "sitecustomize.py").write_text(_PATCH.format(branches=branches))
    path = {"PYTHONPATH": f"{place}:{ROOT / 'src'}"}
    with watched_server(place, tiny_llama(place), variables=path) as process:
        yield process


def _ask(process: ServeProcess, user: str) -> list[str]:
    """What the watch reports of one request."""
    before = len(audit_reports(process))
    with process.client() as client:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "user": user}).status_code == 200
    return audit_reports(process)[before:]


@pytest.mark.parametrize("event", WATCHED)
def test_the_watch_reports_each_event_and_nothing_without_one(doing: ServeProcess, event: str) -> None:
    assert [each for each in _ask(doing, event) if each.startswith(f"AUDIT {event} ")]
    assert _ask(doing, "nobody") == []
