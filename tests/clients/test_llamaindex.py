"""LlamaIndex's OpenAILike with the server's address and nothing else changed."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

openai_like = pytest.importorskip(
    "llama_index.llms.openai_like", reason="llama-index is not installed; `make clients` installs it"
)
core = pytest.importorskip("llama_index.core.llms")
tools = pytest.importorskip("llama_index.core.tools")
prompts = pytest.importorskip("llama_index.core.prompts")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"


class Person(BaseModel):
    """A computer scientist."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada", "Alan", "Grace"]
    born: Literal[1815, 1906, 1912]
    tags: Annotated[list[Literal["maths", "computers"]], Field(max_length=2)]


class WeatherArguments(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{days} days of sun in {city}"


def made(url: str, **options: Any) -> Any:
    return openai_like.OpenAILike(
        **{
            "model": MODEL,
            "api_base": url,
            "api_key": "none",
            "context_window": 8192,
            "is_chat_model": True,
            "is_function_calling_model": True,
            "temperature": 0,
            "max_tokens": 96,
            "max_retries": 0,
            **options,
        }
    )


@pytest.fixture(scope="module")
def model(url: str) -> Any:
    return made(url)


def test_chat_and_its_stream_are_one_answer(model: Any) -> None:
    asked = [core.ChatMessage(role="system", content="You are terse."), core.ChatMessage(role="user", content="Hi!")]
    whole = model.chat(asked)
    assert whole.message.role == "assistant"
    assert whole.message.content
    assert whole.raw.usage.completion_tokens > 0
    chunks = list(model.stream_chat(asked))
    assert "".join(each.delta or "" for each in chunks) == whole.message.content
    assert chunks[-1].message.content == whole.message.content


def test_completions_go_on_from_a_text(url: str, model: Any) -> None:
    plain = made(url, is_chat_model=False, is_function_calling_model=False, max_tokens=6)
    whole = plain.complete(PROMPT)
    assert "Paris" in whole.text
    assert list(plain.stream_complete(PROMPT))[-1].text == whole.text
    assert model.complete("Say hello.").text, "through the conversation's route"


def test_async(model: Any) -> None:
    asked = [core.ChatMessage(role="user", content="Where is Paris?")]
    whole = model.chat(asked).message.content

    async def ask() -> tuple[str, str, str]:
        answer = await model.achat(asked)
        pieces = [each.delta or "" async for each in await model.astream_chat(asked)]
        completed = await model.acomplete("Where is Paris?")
        return answer.message.content, "".join(pieces), completed.text

    assert set(asyncio.run(ask())) == {whole}


def test_tools_are_called_and_answered(model: Any) -> None:
    tool = tools.FunctionTool.from_defaults(weather, fn_schema=WeatherArguments)
    answer = model.chat_with_tools([tool], user_msg="What is the weather in Paris?", tool_required=True)
    [call] = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    result = tool(**call.tool_kwargs)
    assert str(result).endswith(call.tool_kwargs["city"])
    told = core.ChatMessage(role="tool", content=str(result), additional_kwargs={"tool_call_id": call.tool_id})
    asked = core.ChatMessage(role="user", content="What is the weather in Paris?")
    final = model.chat([asked, answer.message, told])
    assert final.message.content
    streamed = list(model.stream_chat_with_tools([tool], user_msg="What is the weather in Paris?", tool_required=True))
    [again] = model.get_tool_calls_from_response(streamed[-1])
    assert (again.tool_name, again.tool_kwargs) == (call.tool_name, call.tool_kwargs)


def test_structured_output_is_a_model(url: str, model: Any) -> None:
    template = prompts.PromptTemplate("A {kind}, please.")
    found = model.structured_predict(Person, template, kind="famous computer scientist")
    assert isinstance(found, Person)
    answer = model.as_structured_llm(Person).complete("A famous computer scientist, please.")
    assert isinstance(answer.raw, Person)
    schema = made(url, should_use_structured_outputs=True)
    assert isinstance(schema.structured_predict(Person, template, kind="computer scientist"), Person)


def test_errors_come_through(url: str) -> None:
    with pytest.raises(Exception, match="this server has smollm2-135m"):
        made(url, model="gpt-4o").complete("hello")
