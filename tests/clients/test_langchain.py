"""LangChain's ChatOpenAI and OpenAI with the server's address and nothing else changed."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed; `make clients` installs it"
)
messages = pytest.importorskip("langchain_core.messages")
tools = pytest.importorskip("langchain_core.tools")
prompts = pytest.importorskip("langchain_core.prompts")
parsers = pytest.importorskip("langchain_core.output_parsers")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"


class Person(BaseModel):
    """A computer scientist."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada", "Alan", "Grace"]
    born: Literal[1815, 1906, 1912]
    tags: Annotated[list[Literal["maths", "computers"]], Field(max_length=2)]


@tools.tool
def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"{days} days of sun in {city}"


@pytest.fixture(scope="module")
def model(url: str) -> Any:
    return langchain_openai.ChatOpenAI(
        model=MODEL,
        base_url=url,
        api_key="none",
        temperature=0,
        max_tokens=96,
        max_retries=0,
        timeout=120,
        stream_usage=True,
    )


def test_an_answer_carries_its_counts(model: Any) -> None:
    answer = model.invoke([messages.SystemMessage("You are terse."), messages.HumanMessage("Say hello.")])
    assert answer.content
    assert answer.usage_metadata["total_tokens"] == (
        answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]
    )
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == MODEL


def test_cached_tokens_are_read(model: Any) -> None:
    text = f"{uuid.uuid4().hex} " + "and so on " * 60
    first, second = (model.bind(max_tokens=2).invoke(text) for _ in range(2))
    assert first.usage_metadata["input_token_details"]["cache_read"] < 64
    assert second.usage_metadata["input_token_details"]["cache_read"] > 64


def test_streams_and_chains_give_the_same_text(model: Any) -> None:
    chain = prompts.ChatPromptTemplate.from_messages([("human", "Name a colour like {thing}.")]) | model
    whole = chain.invoke({"thing": "grass"})
    chunks = list(chain.stream({"thing": "grass"}))
    assert "".join(each.content for each in chunks) == whole.content
    assert len(chunks) > 3
    total = chunks[0]
    for each in chunks[1:]:
        total += each
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert (chain | parsers.StrOutputParser()).invoke({"thing": "grass"}) == whole.content


def test_batches_and_async(model: Any) -> None:
    asked = ["Where is Paris?", "Where is Rome?", "Where is Oslo?"]
    short = model.bind(max_tokens=12)
    batch = [each.content for each in short.batch(asked)]

    async def ask() -> tuple[list[str], str]:
        answers = await asyncio.gather(*(short.ainvoke(each) for each in asked))
        pieces = [each.content async for each in short.astream(asked[0])]
        return [each.content for each in answers], "".join(pieces)

    answers, streamed = asyncio.run(ask())
    assert answers == batch
    assert streamed == batch[0]


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_tools_are_called_and_answered(model: Any, choice: str) -> None:
    bound = model.bind_tools([weather], tool_choice=choice)
    asked = messages.HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([asked])
    [call] = answer.tool_calls
    assert call["name"] == "weather"
    result = weather.invoke(call)
    assert result.content.endswith(call["args"]["city"])
    final = model.bind_tools([weather]).invoke([asked, answer, result])
    assert final.content or final.tool_calls
    total = None
    for each in bound.stream([asked]):
        total = each if total is None else total + each
    assert total is not None
    assert [(each["name"], each["args"]) for each in total.tool_calls] == [(call["name"], call["args"])]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_a_model(model: Any, method: str) -> None:
    structured = model.with_structured_output(Person, method=method)
    person = structured.invoke("A famous computer scientist, please.")
    assert isinstance(person, Person)
    [*_, last] = structured.stream("A famous computer scientist, please.")
    assert last == person
    raw = model.with_structured_output(Person, method=method, include_raw=True).invoke("A computer scientist, please.")
    assert raw["parsing_error"] is None


def test_logprobs_reach_the_metadata(model: Any) -> None:
    answer = model.bind(logprobs=True, top_logprobs=2, max_tokens=4).invoke("Say hello.")
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]
    assert len(content[0]["top_logprobs"]) == 2


def test_plain_completions(url: str) -> None:
    llm = langchain_openai.OpenAI(model=MODEL, base_url=url, api_key="none", temperature=0, max_tokens=6, max_retries=0)
    text = llm.invoke("The capital of France is")
    assert "Paris" in text
    assert "".join(llm.stream("The capital of France is")) == text
    assert llm.batch(["The capital of France is", "Two plus two is"])[0] == text


def test_errors_come_through(url: str) -> None:
    wrong = langchain_openai.ChatOpenAI(model="gpt-4o", base_url=url, api_key="none", max_retries=0)
    with pytest.raises(Exception, match="this server has smollm2-135m"):
        wrong.invoke("hello")
