"""What an operator may grant tenants: from a file, from Python, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.config import EngineConfig, json_schema, resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.tenants import TenantOptions, parse_names, parse_tenants

FILE = """
known_tenants_only = "on"
public_namespaces = ["docs", "manuals"]
[tenants.interactive]
floor_tokens = "64k"
cap-tokens = "256k"
weight = 4
[tenants."batch jobs"]
priority = 5
"""


def test_a_file_names_tenants_and_what_they_are_granted(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(FILE)
    resolved = resolve_config({}, environ={}, file=file)
    assert resolved.config.tenants == (
        TenantOptions("interactive", 64_000, 256_000, 4),
        TenantOptions("batch jobs", priority=5),
    )
    assert resolved.origins["tenants"] == f"file {file}"
    assert resolved.config.public_names == ("docs", "manuals")
    assert resolved.config.known_tenants_only == "on"


def test_python_gives_tenants_as_a_mapping_or_as_options_and_outranks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(FILE)
    found = resolve_config({"tenants": {"a": {"floor_tokens": 320}}}, environ={}, file=file)
    assert found.config.tenants == (TenantOptions("a", 320),)
    assert found.origins["tenants"] == "argument"
    assert resolve_config({"tenants": [TenantOptions("b")]}, environ={}).config.tenants == (TenantOptions("b"),)


def test_a_tenant_describes_itself_as_its_table() -> None:
    tenant = TenantOptions("a", 5, 7, 2.0, -1)
    assert parse_tenants({"a": tenant.describe()}) == (tenant,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"flor_tokens": 5}, "did you mean floor_tokens"),
        ({"floor_tokens": -1}, "floor_tokens is -1; give 0 or more"),
        ({"floor_tokens": True}, "floor_tokens is True"),
        ({"floor_tokens": "much"}, "'much' is not an amount"),
        ({"cap_tokens": 0}, "cap_tokens is 0; give 1 or more"),
        ({"floor_tokens": 32, "cap_tokens": 16}, "is below floor_tokens"),
        ({"weight": 0}, "weight is 0; give a number above 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": "heavy"}, "weight is 'heavy'"),
        ({"priority": 1.5}, "priority is 1.5"),
        ({"priority": 1000}, "priority is 1000"),
        (7, "give a table"),
    ],
)
def test_a_wrong_grant_is_refused_with_the_tenants_name(table: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_config({"tenants": {"acme": table}}, environ={})
    assert "acme" in str(caught.value)


@pytest.mark.parametrize("tenants", ["acme", 5, ["acme"], {"": {}}, {"a\n": {}}, {"x" * 300: {}}])
def test_what_is_no_table_of_tenants_is_refused(tenants: object) -> None:
    with pytest.raises(ConfigError):
        resolve_config({"tenants": tenants}, environ={})


def test_a_tenant_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a' twice"):
        EngineConfig(tenants=(TenantOptions("a"), TenantOptions("a", 16)))


def test_an_error_in_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[tenants.a]\nweight = -1\n")
    with pytest.raises(ConfigError, match=r"a\.toml: tenant 'a': weight is -1"):
        resolve_config({}, environ={}, file=file)


def test_only_known_tenants_with_none_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tenant is known"):
        resolve_config({"known_tenants_only": "on"}, environ={})


@pytest.mark.parametrize("off", [{"enable_prefix_caching": "off"}, {"kv_cache": "contiguous"}])
@pytest.mark.parametrize(
    "asked",
    [
        {"tenants": {"a": {"floor_tokens": 16}}},
        {"tenants": {"a": {"cap_tokens": 16}}},
        {"tenants": {"a": {}}, "known_tenants_only": "on"},
        {"public_namespaces": "docs"},
    ],
)
def test_quotas_and_names_without_a_prefix_cache_are_refused(off: dict[str, str], asked: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="there is no prefix cache"):
        resolve_config({**asked, **off}, environ={})
    resolve_config({"tenants": {"a": {"weight": 3}}, **off}, environ={})


def test_names_are_read_from_text_and_lists() -> None:
    assert parse_names("x", " docs, manuals,docs ") == ("docs", "manuals")
    assert parse_names("x", " ") == ()
    for wrong in ("a b", "a b,,", "a,,b", "a,", ",a", ","):
        with pytest.raises(ConfigError, match="one comma between two"):
            parse_names("x", wrong)
    assert parse_names("x", ["docs"]) == ("docs",)
    for wrong in (5, {"a": 1}, [""], ["a\0b"]):
        with pytest.raises(ConfigError):
            parse_names("x", wrong)
    with pytest.raises(ConfigError, match="public_namespaces"):
        resolve_config({"public_namespaces": "a,\x01"}, environ={})


def test_the_schema_describes_the_table_of_tenants() -> None:
    properties = json_schema()["properties"]
    assert isinstance(properties, dict)
    table = properties["tenants"]["additionalProperties"]
    assert list(table["properties"]) == list(TenantOptions("a").describe())
    assert table["additionalProperties"] is False
