from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pagemill.base.config import OPTIONS, EngineConfig, json_schema, resolve_config
from pagemill.base.errors import ConfigError


def test_precedence_is_argument_then_environment_then_file_then_default(tmp_path: Path) -> None:
    file = tmp_path / "pagemill.toml"
    file.write_text('block_size = 32\nmax_num_seqs = 3\nmax-model-len = "2K"\n')
    environ = {"PAGEMILL_MAX_NUM_SEQS": "4", "PAGEMILL_BLOCK_SIZE": "48"}
    found = resolve_config({"block_size": "64"}, environ=environ, file=file, origin="command line")
    assert (found.config.block_size, found.config.max_num_seqs, found.config.max_model_len) == (64, 4, 2048)
    assert found.config.num_threads is None
    assert found.origins["block_size"] == "command line"
    assert found.origins["max_num_seqs"] == "PAGEMILL_MAX_NUM_SEQS"
    assert found.origins["max_model_len"] == f"file {file}"
    assert found.origins["dtype"] == "default"


def test_the_file_that_the_environment_names_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("seed = 7\n")
    assert resolve_config({}, environ={"PAGEMILL_CONFIG": str(file)}).config.seed == 7


def test_a_file_argument_replaces_the_file_of_the_environment(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("seed = 7\n")
    second.write_text("seed = 8\n")
    assert resolve_config({}, environ={"PAGEMILL_CONFIG": str(first)}, file=second).config.seed == 8


def test_sizes_are_parsed_wherever_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('kv_cache_memory_bytes = "1GiB"\n')
    assert resolve_config({}, environ={}, file=file).config.kv_cache_memory_bytes == 2**30
    environ = {"PAGEMILL_KV_CACHE_MEMORY_BYTES": "512MiB"}
    assert resolve_config({}, environ=environ).config.kv_cache_memory_bytes == 512 * 2**20
    assert resolve_config({"kv_cache_memory_bytes": 4096}, environ={}).config.kv_cache_memory_bytes == 4096


def test_none_unsets_an_optional_value() -> None:
    environ = {"PAGEMILL_MAX_MODEL_LEN": "512"}
    assert resolve_config({"max_model_len": None}, environ=environ).config.max_model_len is None
    assert resolve_config({"max_model_len": "none"}, environ=environ).config.max_model_len is None


def test_an_unknown_argument_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'max_model_length'; did you mean max_model_len\?"):
        resolve_config({"max_model_length": 5}, environ={})


def test_an_unknown_name_in_the_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("blok_size = 16\n")
    with pytest.raises(ConfigError, match=r"a\.toml: unknown option 'blok_size'; did you mean block_size\?"):
        resolve_config({}, environ={}, file=file)


def test_an_unknown_variable_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"PAGEMILL_BLOCKSIZE; did you mean PAGEMILL_BLOCK_SIZE\?"):
        resolve_config({}, environ={"PAGEMILL_BLOCKSIZE": "16"})


def test_variables_that_are_not_options_are_left_alone() -> None:
    environ = {"PAGEMILL_HOME": "/x", "PAGEMILL_THREADS": "1", "PAGEMILL_FORCE_TARGET": "scalar", "PATH": "/bin"}
    assert resolve_config({}, environ=environ).config == EngineConfig()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_size", 17, "multiple of 16"),
        ("block_size", 0, "multiple of 16"),
        ("block_size", 2048, "multiple of 16"),
        ("block_size", "many", "block_size: 'many' is not an amount"),
        ("block_size", 16.0, "give a number of tokens"),
        ("block_size", True, "give a number of tokens"),
        ("max_num_seqs", 0, "from 1 to"),
        ("max_num_batched_tokens", 0, "from 1 to"),
        ("max_model_len", "0", "from 1 to"),
        ("num_threads", 0, "from 1 to"),
        ("num_threads", 1000, "from 1 to 256"),
        ("kv_cache_memory_bytes", "0", "from 1 to"),
        ("kv_cache_memory_bytes", "-5GiB", "512MiB"),
        ("seed", "-1", "2\\^64"),
        ("seed", 2**64, "2\\^64"),
        ("seed", "x", "2\\^64"),
        ("dtype", "float23", "did you mean float32\\?"),
        ("dtype", 32, "one of auto, float32, bfloat16"),
        ("weight_format", "q8", "did you mean q8_0\\? choose one of auto, exact, int8, q8_0, bf16, f32"),
        ("weight_format", "q4_0", "not quantised to 4 bits at load.*; give q8_0, or take a checkpoint that is 4-bit"),
        ("weight_format", "q4_1", "not quantised to 4 bits at load"),
        ("kv_cache", "page", "did you mean paged\\?"),
        ("executor", "gpu", "native, reference"),
        ("model", "  ", "smollm2-135m"),
        ("model", 3, "give text"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_is_accepted(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_config({name: value}, environ={})
    assert name in str(caught.value)


def test_the_largest_seed_is_kept_exactly() -> None:
    assert resolve_config({"seed": str(2**64 - 1)}, environ={}).config.seed == 2**64 - 1


def test_an_error_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="environment variable PAGEMILL_SEED"):
        resolve_config({}, environ={"PAGEMILL_SEED": "x"})


def test_a_budget_below_the_number_of_sequences_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\) is below max_num_seqs \(16\)"):
        resolve_config({"max_num_batched_tokens": 8, "max_num_seqs": 16}, environ={})


@pytest.mark.parametrize(
    ("dtype", "weight_format", "weights"),
    [
        ("auto", "auto", "auto"),
        ("float32", "auto", "f32"),
        ("bfloat16", "auto", "bf16"),
        ("auto", "q8_0", "q8_0"),
        ("auto", "f32", "f32"),
        ("float32", "f32", "f32"),
        ("bfloat16", "bf16", "bf16"),
    ],
)
def test_dtype_and_weight_format_name_one_format(dtype: str, weight_format: str, weights: str) -> None:
    assert EngineConfig(dtype=dtype, weight_format=weight_format).weights == weights


@pytest.mark.parametrize(
    ("dtype", "weight_format", "means"),
    [("float32", "q8_0", "f32"), ("float32", "bf16", "f32"), ("bfloat16", "f32", "bf16"), ("bfloat16", "q8_0", "bf16")],
)
def test_a_weight_format_that_the_dtype_denies_is_a_contradiction(dtype: str, weight_format: str, means: str) -> None:
    message = f"dtype is {dtype}, which means weight_format {means}, and weight_format is {weight_format}; set one"
    with pytest.raises(ConfigError, match=message):
        resolve_config({"dtype": dtype}, environ={"PAGEMILL_WEIGHT_FORMAT": weight_format})


def test_a_small_budget_alone_is_no_contradiction() -> None:
    assert resolve_config({"max_num_batched_tokens": 8}, environ={}).config.max_num_batched_tokens == 8


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration file .*nowhere\.toml"):
        resolve_config({}, environ={}, file=tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"block_size = = 3", b"\xff\xfe", b"[[["])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not a TOML file"):
        resolve_config({}, environ={}, file=file)


def test_a_table_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[block_size]\nx = 1\n")
    with pytest.raises(ConfigError, match="give a number of tokens"):
        resolve_config({}, environ={}, file=file)


def test_the_schema_covers_every_option_with_its_choices() -> None:
    schema = json_schema()
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert list(properties) == [each.name for each in fields(EngineConfig)]
    assert properties["dtype"]["enum"] == ["auto", "float32", "bfloat16"]
    assert properties["kv_cache_memory_bytes"]["type"] == ["integer", "string", "null"]
    assert schema["additionalProperties"] is False


def test_every_option_has_help_and_a_variable_of_its_own() -> None:
    assert all(each.help.endswith(".") and len(each.help) > 10 for each in OPTIONS.values())
    assert len({each.variable for each in OPTIONS.values()}) == len(OPTIONS)
