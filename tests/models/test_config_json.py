from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ModelError
from pagemill.models.config_json import ConfigFile, parse_object, read_bounded, read_config


def config(**values: Any) -> ConfigFile:
    return ConfigFile("config.json", values)


def test_null_counts_as_missing() -> None:
    assert not config(a=None).has("a")
    assert config(a=None).get_int("a", 7) == 7
    with pytest.raises(ModelError, match=r"config\.json: 'a' is missing"):
        config(a=None).get_int("a")


def test_whole_numbers_are_numbers_too() -> None:
    assert config(a=3).get_float("a") == 3.0
    assert config(a=3).get_int("a") == 3


@pytest.mark.parametrize("value", [3.0, "3", True, [3], {}])
def test_only_whole_numbers_are_whole_numbers(value: object) -> None:
    with pytest.raises(ModelError, match="not a whole number"):
        config(a=value).get_int("a")


@pytest.mark.parametrize("value", ["3", True, [3.0]])
def test_only_numbers_are_numbers(value: object) -> None:
    with pytest.raises(ModelError, match="not a number"):
        config(a=value).get_float("a")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 11.0])
def test_numbers_outside_their_range_are_refused(value: float) -> None:
    with pytest.raises(ModelError, match="outside 0 to 10"):
        config(a=value).get_float("a", minimum=0, maximum=10)


def test_range_includes_its_ends() -> None:
    assert [config(a=value).get_int("a", minimum=1, maximum=2) for value in (1, 2)] == [1, 2]


def test_ids_are_one_or_several_or_none() -> None:
    assert config(a=3).get_ids("a", 4) == (3,)
    assert config(a=[0, 3]).get_ids("a", 4) == (0, 3)
    assert config().get_ids("a", 4) == ()


@pytest.mark.parametrize("value", [4, -1, [0, "1"], "2", True])
def test_ids_outside_the_vocabulary_are_refused(value: object) -> None:
    with pytest.raises(ModelError, match="not token ids from 0 to 3"):
        config(a=value).get_ids("a", 4)


def test_nested_settings_name_where_they_are() -> None:
    assert config(a={"b": 1}).get_object("a").get_int("b") == 1
    assert config().get_object("a").values == {}
    with pytest.raises(ModelError, match=r"config\.json, a: 'b' is missing"):
        config(a={}).get_object("a").get_int("b")


def test_every_setting_that_is_not_supported_is_listed() -> None:
    with pytest.raises(ModelError, match=r"a is 2, supported: 1; b is 'x', supported: none, leave it out"):
        config(a=2, b="x", c=3).refuse_unless({"a": (1,), "b": (), "c": (3,), "d": (4,)}, "family")


def test_true_is_not_one() -> None:
    with pytest.raises(ModelError, match="a is True, supported: 1"):
        config(a=True).refuse_unless({"a": (1,)}, "family")


def test_hostile_values_are_shortened_in_messages() -> None:
    with pytest.raises(ModelError) as error:
        config(a="x" * 10_000).get_int("a")
    assert len(str(error.value)) < 200


def test_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_config(path).get_int("a") == 1
    assert read_bounded(path, 8) == b'{"a": 1}'
    with pytest.raises(ModelError, match="larger than 7 bytes"):
        read_bounded(path, 7)


def test_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; fetch the whole checkpoint"):
        read_config(tmp_path / "config.json")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"a": NaN}', b"\xff", b'{"a":' * 5000])
def test_text_that_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match=r"x\.json (is not valid JSON|holds no JSON object)"):
        parse_object(content, "x.json")
