"""Errors of one prompt of several say which, and keep what they carry."""

from __future__ import annotations

from pagemill.base.errors import CapacityError, LengthError, ModelError, RequestError
from pagemill.llm.questions import at_index


def test_an_error_of_one_of_several_prompts_keeps_what_it_carries() -> None:
    refused = at_index(2, RequestError("none such", status=403, param="prompt"))
    assert isinstance(refused, RequestError)
    assert (str(refused), refused.status, refused.param) == ("prompt 2: none such", 403, "prompt")
    full = at_index(0, CapacityError("full", retry_after_s=3.0, param="max_tokens"))
    assert isinstance(full, CapacityError)
    assert (str(full), full.retry_after_s, full.param) == ("prompt 0: full", 3.0, "max_tokens")
    assert type(at_index(1, LengthError("long", param="prompt"))) is LengthError
    assert type(at_index(1, ModelError("no vocabulary"))) is ModelError
