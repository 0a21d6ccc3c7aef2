"""S1: the isolation matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache import prefix
from pagemill.kernels.target import available_targets
from tests.contracts.cache import broken
from tests.trust import matrix
from tests.trust.figures import Figure


def test_every_field_of_a_key_keeps_texts_apart(publish: Callable[[Figure], None]) -> None:
    publish(matrix.count([matrix.cache_cells(), matrix.token_cells(), matrix.key_cells()]))


def test_engines_that_compute_other_bytes_are_told_apart(tmp_path: Path, publish: Callable[[Figure], None]) -> None:
    publish(matrix.count([matrix.engine_cells(tmp_path)]))


def test_engines_are_told_apart_where_another_target_than_the_best_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", available_targets()[-1])
    figure = matrix.count([matrix.engine_cells(tmp_path)])
    assert figure.num_trials > 0
    assert figure.num_failures == 0, str(figure)


def test_a_cell_and_its_control_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.shares_across_tenants(monkeypatch)
    told = matrix.cell((CacheOptions("t"), matrix.BASE), (CacheOptions("u"), matrix.BASE), "not seen")
    assert any("hit 12 tokens" in line for line in told)
    monkeypatch.undo()
    monkeypatch.setattr(prefix.PrefixTree, "find", lambda self, root, tokens, most: prefix.Match(root, []))
    told = matrix.cell((CacheOptions("t"), matrix.BASE), (CacheOptions("u"), matrix.BASE), "not seen")
    assert any("did not hit" in line for line in told)


@pytest.mark.parametrize("name", list(matrix.VALUES))
def test_a_field_left_out_of_the_key_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = matrix.VALUES[name][0]
    root = prefix.PrefixTree.root

    def without(self: prefix.PrefixTree, namespace: matrix.Namespace, fingerprint: matrix.Fingerprint) -> prefix.Node:
        return root(self, namespace, matrix.replace(fingerprint, **{name: value}))  # type: ignore[arg-type]

    monkeypatch.setattr(prefix.PrefixTree, "root", without)
    figure = matrix.count([matrix.cache_cells()])
    assert figure.num_failures >= len(matrix.VALUES[name]) * (len(matrix.VALUES[name]) - 1)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, matrix.Fingerprint]:
    return matrix.engines_of(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", sorted(set(matrix.VALUES) - matrix.NOT_OF_ENGINES))
def test_a_field_that_engines_no_longer_tell_is_noticed_by_itself(
    name: str, engines: dict[str, matrix.Fingerprint]
) -> None:
    """Also where the digest of the weights, or another field, goes on telling these engines apart."""
    assert not any(matrix.told_apart(engines))
    value = getattr(engines["plain"], name)
    fixed = {each: matrix.replace(engine, **{name: value}) for each, engine in engines.items()}
    assert any(matrix.told_apart(fixed))
