"""OpenAI's SDK asking for a form: tools at once and streamed, JSON by schema, `parse` into pydantic's models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

openai = pytest.importorskip("openai", reason="openai is not installed; `make clients` installs it")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 96}


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


class GetTime(BaseModel):
    """The time of a city."""

    city: Literal["Paris", "Rome"]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Ada", "Alan", "Grace"]
    born: Literal[1815, 1906, 1912]
    tags: Annotated[list[Literal["maths", "computers"]], Field(max_length=2)]


TOOLS: Any = [
    openai.pydantic_function_tool(each, name=name) for each, name in ((GetWeather, "weather"), (GetTime, "time"))
]
WEATHER: Any = {"type": "function", "function": {"name": "weather"}}
PERSON: Any = [{"role": "user", "content": "A famous computer scientist, as JSON."}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_demanded_call_fits_its_schema(client: Any) -> None:
    answer = client.chat.completions.create(messages=ASKED, tools=TOOLS, tool_choice=WEATHER, **GREEDY)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert (call.type, call.function.name) == ("function", "weather")
    GetWeather.model_validate_json(call.function.arguments)
    some = client.chat.completions.create(messages=ASKED, tools=TOOLS, tool_choice="required", **GREEDY)
    assert some.choices[0].message.tool_calls[0].function.name in ("weather", "time")


def test_streamed_calls_are_the_same_calls(client: Any) -> None:
    fields = {"messages": ASKED, "tools": TOOLS, "tool_choice": WEATHER, **GREEDY}
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls[0].function
    pieces: list[str] = []
    names, ids, ends = [], [], []
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            ends += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                ids += [call.id] if call.id else []
                pieces.append(call.function.arguments or "")
    assert (names, len(ids), ends) == (["weather"], 1, ["tool_calls"])
    assert json.loads("".join(pieces)) == json.loads(whole.arguments)
    assert len([each for each in pieces if each]) > 2, "arguments come while they are made"


def test_the_stream_helper_parses_calls(client: Any) -> None:
    with client.chat.completions.stream(messages=ASKED, tools=TOOLS, tool_choice=WEATHER, **GREEDY) as stream:
        done = [each for each in stream if each.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    [event] = done
    assert isinstance(event.parsed_arguments, GetWeather)
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == event.parsed_arguments


def test_results_of_calls_go_back_into_the_conversation(client: Any) -> None:
    first = client.chat.completions.create(messages=ASKED, tools=TOOLS, tool_choice=WEATHER, **GREEDY)
    message = first.choices[0].message
    told: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18 degrees and sunny"}
    # the message goes back as the SDK gave it
    answer = client.chat.completions.create(messages=[*ASKED, message, told], tools=TOOLS, tool_choice="none", **GREEDY)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content.strip()
    alone = client.chat.completions.create(messages=[*ASKED, message], tools=TOOLS, tool_choice="none", **GREEDY)
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens, "the result is part of the prompt"
    assert first.usage.prompt_tokens > alone.usage.prompt_tokens, "tools that may not be called are not told"
    free = client.chat.completions.create(messages=[*ASKED, message, told], tools=TOOLS, **GREEDY)
    assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_json_schema_and_json_object(client: Any) -> None:
    schema = Person.model_json_schema()
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(messages=PERSON, response_format=form, **GREEDY)
    Person.model_validate_json(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(messages=PERSON, response_format=form, stream=True, **GREEDY)
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == answer.choices[0].message.content
    loose = client.chat.completions.create(
        messages=PERSON, response_format={"type": "json_object"}, **{**GREEDY, "max_tokens": 256}
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)
    else:
        assert loose.choices[0].message.content.lstrip().startswith("{")


def test_parse_returns_models(client: Any, url: str) -> None:
    answer = client.chat.completions.parse(messages=PERSON, response_format=Person, **GREEDY)
    assert isinstance(answer.choices[0].message.parsed, Person)
    called = client.chat.completions.parse(messages=ASKED, tools=TOOLS, tool_choice=WEATHER, **GREEDY)
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(messages=PERSON, response_format=Person, **GREEDY) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == answer.choices[0].message.parsed

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as own:
            return await own.chat.completions.parse(messages=PERSON, response_format=Person, **GREEDY)

    assert asyncio.run(ask()).choices[0].message.parsed == answer.choices[0].message.parsed


def test_an_answer_cut_short_is_told_as_such(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(messages=PERSON, response_format=Person, **{**GREEDY, "max_tokens": 4})
