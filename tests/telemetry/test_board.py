"""The Grafana board asks only for what the catalogue declares. That a running server shows it is tested with one, in
tests/server/test_access_serve.py."""

from __future__ import annotations

import json
import re

import pytest

from pagemill.telemetry.catalog import BASE_LABELS, CATALOG, exposed_names
from tests.fixtures.board import BOARD, Expression, expressions

EXPRESSIONS = expressions()
NAMES = exposed_names()


def test_the_board_is_one_that_grafana_can_import() -> None:
    board = json.loads(BOARD.read_text())
    assert board["title"] == "Pagemill"
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["targets"] and panel["description"] for panel in panels)
    for one in panels:
        for other in panels:
            a, b = one["gridPos"], other["gridPos"]
            apart = (
                a["x"] + a["w"] <= b["x"]
                or b["x"] + b["w"] <= a["x"]
                or a["y"] + a["h"] <= b["y"]
                or b["y"] + b["h"] <= a["y"]
            )
            assert one is other or apart, (one["title"], other["title"])


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each.panel)
def test_every_expression_asks_for_metrics_and_labels_that_there_are(expression: Expression) -> None:
    assert expression.selectors
    known: set[str] = set()
    for name, matchers in expression.selectors:
        if name.startswith("process_"):
            continue
        assert name in NAMES, name
        labels = {*BASE_LABELS, *NAMES[name].labels, *(["le"] if name.endswith("_bucket") else [])}
        assert {label for label, _ in matchers} <= labels
        known |= labels
    assert {*expression.by, *expression.legend} <= known


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each.panel)
def test_counters_are_shown_as_rates_and_gauges_as_they_are(expression: Expression) -> None:
    for name, _ in expression.selectors:
        if name.startswith("process_") or expression.panel == "Corrupt blocks":
            continue
        rated = re.search(rf"rate\({re.escape(name)}\{{", expression.text) is not None
        assert rated == (NAMES[name].kind != "gauge"), name


def test_brackets_of_every_expression_are_closed() -> None:
    for each in EXPRESSIONS:
        for opened, closed in ("()", "{}", "[]"):
            assert each.text.count(opened) == each.text.count(closed), each.text


def test_the_board_shows_nearly_all_there_is() -> None:
    shown = {NAMES[name].name for each in EXPRESSIONS for name, _ in each.selectors if name in NAMES}
    told_elsewhere = {
        "vllm:cache_config_info", "vllm:request_inference_time_seconds", "pagemill:kv_lookup_tokens", "pagemill:spans",
    }  # fmt: skip
    assert CATALOG.keys() - shown == told_elsewhere
