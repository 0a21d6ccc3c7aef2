"""S14: no file of ours unpickles, evaluates or runs a shell, and no server does while it answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.trust import doors, watched
from tests.trust.figures import Figure

REQUESTS = 480


def test_no_file_unpickles_evaluates_or_runs_a_shell(publish: Callable[[Figure], None]) -> None:
    figure = watched.scan()
    publish(figure)
    assert figure.also["files"] > 100


def test_a_server_does_none_of_it_while_it_answers(publish: Callable[[Figure], None]) -> None:
    figure = watched.serve(REQUESTS)
    publish(figure)
    assert figure.also["of them answered with 200"] > REQUESTS // 2
    assert figure.also["there answered with 200"] > figure.also["to the admin port"] // 2


def test_every_route_of_the_admin_port_is_asked() -> None:
    asked = {(method, path.partition("?")[0]) for method, path, _ in watched.ADMIN} | {("POST", "/admin/drain")}
    routes = doors.admin_routes()
    assert asked == {(method, path) for path, methods in routes.items() for method in methods - {"HEAD"}}


def test_a_server_that_starts_a_process_for_a_request_is_seen(tmp_path: Path) -> None:
    """In a process whose product does: the server imports this before anything else."""
    patch = (
        "import subprocess\n"
        "from pagemill.server import asking\n"
        "before = asking.cache_of\n"
        "def cache_of(body, *rest):\n"
        "    if body.user == 'evil': subprocess.run(['true'])\n"
        "    return before(body, *rest)\n"
        "asking.cache_of = cache_of\n"
    )
    (tmp_path / "sitecustomize.py").write_text(patch)
    figure = watched.serve(2, further_path=str(tmp_path), changes={"user": "evil"})
    assert any("subprocess.Popen" in each for each in figure.replays)


def test_a_server_that_starts_a_process_for_its_admin_is_seen(tmp_path: Path) -> None:
    """As above, on the admin port alone."""
    patch = (
        "import subprocess\n"
        "from pagemill.server import admin_cache\n"
        "before = admin_cache.list_tenants\n"
        "def list_tenants(engine):\n"
        "    subprocess.run(['true'])\n"
        "    return before(engine)\n"
        "admin_cache.list_tenants = list_tenants\n"
    )
    (tmp_path / "sitecustomize.py").write_text(patch)
    figure = watched.serve(2, further_path=str(tmp_path))
    assert any("subprocess.Popen" in each for each in figure.replays)
