"""Figures of the trust tests: collected through reports, so that every process's come together, printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.trust.figures import Figure, added


@pytest.fixture
def publish(record_property: Callable[[str, object], None]) -> Callable[[Figure], None]:
    """Print a figure with the others at the end, and fail where it counts a failure."""

    def take(figure: Figure) -> None:
        record_property("figure", figure.encode())
        assert figure.num_trials > 0, f"nothing ran: {figure}"
        assert figure.num_failures == 0, str(figure)

    return take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: what is built with sanitizers."""
    items.sort(key=lambda item: not item.path.name.startswith("test_r17"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    told = [str(value) for report in reports for name, value in report.user_properties if name == "figure"]
    if told:
        terminalreporter.section("trust: failures in N trials, and what that bounds their rate at (3/N)")
        for figure in sorted(added(map(Figure.decode, told)), key=lambda each: (each.test[0], int(each.test[1:]))):
            terminalreporter.write_line(str(figure))
