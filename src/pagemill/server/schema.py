"""Requests as clients send them: OpenAI's fields, vLLM's extras and our own, with their types. Owns names and types;
ranges are checked where they are meant (`base/params.py`), and what they mean is in `asking.py`.

Fields that are not known are kept aside (`model_extra`), at any depth, reported once and refused with --strict. Where
they would silently leave out what was asked of the cache or of the answer's form, they are always refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticUseDefault

from pagemill.base.params import DEFAULT_MAX_TOKENS

MAX_ITEMS = 4096


def _number(value: Any) -> Any:
    """The value; true and false, which Python takes for 1 and 0, are no numbers."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _truth(value: Any) -> Any:
    """The value; 0 and 1 are no truth values."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


def _flag(value: Any) -> Any:
    """The same; null stands for the field's default, as clients send it for what was not set."""
    if value is None:
        raise PydanticUseDefault
    return _truth(value)


# Every number and truth value of every body is of one of these.
Whole = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float)]
Truth = Annotated[bool, BeforeValidator(_truth, json_schema_input_type=bool)]
Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool | None)]
TokenIds = list[Whole]


def _without_unset(value: Any, known: Collection[str]) -> Any:
    """The object without what is not known and null or false: clients send whole objects, and this asks for nothing."""
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if key in known or (each is not None and each is not False)}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class StreamOptions(_Part):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False


class RetainRange(_Part):
    """Prompt positions from .. to - 1 with a priority (0 to 100) for `ttl` seconds; `to` unset: the prompt's end."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    start: Whole = Field(0, alias="from")
    to: Whole | None = None
    priority: Whole = 80
    ttl: Number | str | None = None


class CacheRequest(_Part):
    """What a request asks of the prefix cache. bypass: read nothing, leave nothing. purge_on_end: drop the prompt's
    text from the cache when the answer has ended."""

    model_config = ConfigDict(extra="forbid")
    retain: list[RetainRange] = Field(default_factory=list, max_length=64)
    bypass: Flag = False
    purge_on_end: Flag = False


class PromptCacheOptions(_Part):
    """mode implicit: all of the prompt is kept; explicit: up to the last breakpoint. ttl: as "30m"."""

    model_config = ConfigDict(extra="forbid")
    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: str | Number | None = None


class JsonSchemaFormat(_Part):
    name: str = "schema"
    schema_: dict[str, Any] | Truth | None = Field(None, alias="schema")
    strict: Truth | None = None
    description: str | None = None


class ResponseFormat(_Part):
    """type text, json_object (with llama.cpp's `schema` one of this schema), json_schema, regex (with `regex`) or
    grammar (Lark, with `grammar`)."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | Truth | None = Field(None, alias="schema")
    regex: str | None = None
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _set(cls, value: Any) -> Any:
        return _without_unset(value, {"type", "json_schema", "schema", "regex", "grammar"})


class StructuredOutputs(_Part):
    """vLLM's form of the same; one of them."""

    model_config = ConfigDict(extra="forbid")
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, max_length=MAX_ITEMS)
    grammar: str | None = None
    json_object: Truth | None = None

    @model_validator(mode="before")
    @classmethod
    def _set(cls, value: Any) -> Any:
        return _without_unset(value, {"json", "regex", "choice", "grammar", "json_object"})


class GenerationBody(_Body):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: Whole | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Whole | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_ITEMS)
    ignore_eos: Flag = False
    include_stop_str_in_output: Flag = False
    skip_special_tokens: Flag = True
    prompt_logprobs: Whole | None = None
    return_token_ids: Flag = False
    priority: Whole | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=MAX_ITEMS)
    guided_grammar: str | None = None
    # the prompt cache's
    prompt_cache_key: str | None = Field(None, max_length=1024)
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    cache: CacheRequest | None = None
    deadline_s: Number | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[TokenIds] | list[str]
    max_tokens: Whole | None = int(DEFAULT_MAX_TOKENS)
    logprobs: Whole | None = None
    echo: Flag = False
    best_of: Whole | None = None
    suffix: str | None = None
    add_special_tokens: Flag = True


class FunctionDefinition(_Part):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Truth | None = None


class ToolDefinition(_Part):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatMessage(_Part):
    """A message. What clients send back of an answer is known, though templates read little of it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any] | str] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class ConversationFields(_Body):
    """What decides, beside the messages, which tokens a conversation becomes."""

    tools: list[ToolDefinition] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag = True


class ChatBody(ConversationFields, GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_ITEMS)
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    logprobs: Flag = False
    top_logprobs: Whole | None = None
    parallel_tool_calls: Truth | None = None
    store: Truth | None = None
    metadata: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None


class TokenizeBody(ConversationFields):
    """POST /tokenize: a text (`prompt`) or a conversation (`messages`, with the same fields as a chat's)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, max_length=MAX_ITEMS)
    add_special_tokens: Flag = True
    return_token_strs: Flag = False


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
