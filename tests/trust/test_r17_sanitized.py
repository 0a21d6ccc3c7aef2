"""R17: native code under address and undefined-behaviour sanitizers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.trust import sanitized
from tests.trust.figures import Figure


@pytest.mark.timeout(1800)  # the first time it is built
@pytest.mark.parametrize("tests", sanitized.CI_TESTS)
def test_the_kernel_contract_suite_finds_nothing(tests: str, publish: Callable[[Figure], None]) -> None:
    figure = sanitized.count([tests])
    publish(figure)
    assert figure.num_trials > 10


@pytest.mark.timeout(1800)
def test_a_suite_that_fails_is_a_finding() -> None:
    figure = sanitized.count([*sanitized.CI_TESTS[2:], "-k", "there_is_no_such_test"])
    assert figure.num_failures == 1
