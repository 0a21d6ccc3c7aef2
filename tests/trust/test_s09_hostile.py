"""S9: no request that the schema allows or forbids, and no chain of them, is answered as our mistake."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pagemill.server.app import create_app
from tests.fixtures.live_server import SETTINGS
from tests.trust import doors
from tests.trust.admin_schema import DRAIN, admin_schema
from tests.trust.figures import Figure

if "CI" not in os.environ:
    pytest.importorskip("schemathesis", reason="pip install schemathesis, or `make trust-ci`")

from tests.trust import hostile

CASES = 750


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(2))
def test_no_case_is_answered_wrongly(part: int, publish: Callable[[Figure], None]) -> None:
    figures = hostile.count(part, CASES)
    for figure in figures:
        publish(figure)
    [counted, watched] = figures
    assert counted.num_trials >= CASES
    kinds = ("positive", "negative", "methods", "2xx", "4xx")
    assert min(counted.also[kind] for kind in ("in chains", *kinds, *(f"admin {kind}" for kind in kinds))) > 20
    assert watched.num_trials == counted.num_trials


def test_every_operation_of_both_ports_has_a_share() -> None:
    public = {
        f"{method.upper()} {path}"
        for path, methods in create_app(None, SETTINGS).openapi()["paths"].items()  # type: ignore[arg-type]
        for method in methods
    }
    assert public | {f"GET {path}" for path in hostile.UNPUBLISHED} == hostile.SHARES.keys()
    admin = {f"{method.upper()} {path}" for path, methods in admin_schema()["paths"].items() for method in methods}
    assert admin - {DRAIN} == hostile.ADMIN_SHARES.keys()


def test_the_description_of_the_admin_port_knows_every_route() -> None:
    described = {
        path.replace("{tenant}", "alice").replace("{pin_id}", "1"): {method.upper() for method in methods}
        for path, methods in admin_schema()["paths"].items()
    }
    assert described == {path: methods - {"HEAD"} for path, methods in doors.admin_routes().items()}


class Told:
    """An answer as clients of it see one."""

    def __init__(self, status: int, content: bytes) -> None:
        self.status_code = status
        self.content = content
        self.request = self
        self.method = "POST"


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (Told(200, b"{}"), ""), (Told(400, b'{"error": {"message": "n is 5"}}'), ""), (Told(400, b"{}"), "message"),
        (Told(404, b"<html>"), "message"), (Told(500, b'{"error": {"message": "ours"}}'), "500"), (None, "no whole"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_one_of_ours_a_hang_or_an_error_without_a_message(answer: object, wrong: str) -> None:
    tally = hostile.Tally()
    tally.took("positive", answer, "POST /x")
    assert bool(tally.wrong) == bool(wrong)
    assert wrong in "".join(tally.wrong)


def test_an_answer_that_comes_behind_its_own_deadline_is_no_mistake_of_ours() -> None:
    late, tally = Told(504, b'{"error": {"message": "late"}}'), hostile.Tally()
    tally.took("positive", late, "POST /x {'deadline_s': 5.4e-147}")
    assert not tally.wrong
    for given in ("None", "60", "1.5e3"):
        tally.took("positive", late, f"POST /x {{'deadline_s': {given}}}")
    assert len(tally.wrong) == 3


def test_a_mistake_of_the_admin_port_is_seen(tmp_path: Path) -> None:
    """In a process that has one: the server imports this before anything else."""
    patch = (
        "from pagemill.server import admin_cache\ndef purge(*_): raise KeyError('ours')\nadmin_cache.purge = purge\n"
    )
    (tmp_path / "sitecustomize.py").write_text(patch)
    with hostile.served(tmp_path, str(tmp_path)) as process:
        admin = hostile.admin_attack(process, 0, hostile.Tally())
        admin.cases("POST /admin/cache/purge", hostile.GenerationMode.POSITIVE, 10)
        admin.cases("POST /admin/cache/pin", hostile.GenerationMode.POSITIVE, 10)
    assert admin.tally.num_server_errors > 0
    assert all("/admin/cache/purge" in each for each in admin.tally.wrong)
