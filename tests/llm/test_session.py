"""A session answers one thing at a time, and what was said stays to be read."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread

import pytest

from pagemill import LLM, RequestError, SamplingParams
from tests.fixtures.tiny import tiny_llama

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
NUM_THREADS = 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = str(tiny_llama(tmp_path_factory.mktemp("tiny")))
    with LLM(model, kv_cache_memory_bytes="8MiB", max_num_seqs=8, packed_weights_cache="off") as made:
        yield made


def questions(messages: list[dict[str, str]]) -> list[str]:
    return [each["content"] for each in messages if each["role"] == "user"]


def test_each_question_of_several_threads_is_kept_or_refused(llm: LLM) -> None:
    session, begin = llm.session(), Barrier(NUM_THREADS)
    answered: list[str] = []
    refused: list[RequestError] = []

    def ask(text: str) -> None:
        begin.wait()
        try:
            session.say(text, LONG)
            answered.append(text)
        except RequestError as error:
            refused.append(error)

    threads = [Thread(target=ask, args=(f"hi {index}",)) for index in range(NUM_THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(answered) + len(refused) == NUM_THREADS
    assert sorted(questions(session.messages)) == sorted(answered)
    assert {each.status for each in refused} <= {409}


def test_while_a_stream_is_open_nothing_else_is_asked(llm: LLM) -> None:
    session = llm.session()
    mark = session.snapshot()
    stream = session.stream("one", LONG)
    next(stream)
    for other in (
        lambda: session.say("two", SHORT),
        lambda: next(session.stream("two")),
        lambda: session.restore(mark),
    ):
        with pytest.raises(RequestError, match=r"this session is answering; .*close its open stream, or ask a fork"):
            other()
    branch = session.fork()
    branch.say("two", SHORT)
    stream.close()
    assert questions(session.messages) == ["one"]
    assert questions(branch.messages) == ["two"]
    session.say("three", SHORT)
    assert questions(session.messages) == ["one", "three"]


def test_a_refused_question_leaves_the_session_free(llm: LLM) -> None:
    session = llm.session()
    with pytest.raises(RequestError, match="give text"):
        session.say(5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no snapshot 0"):
        session.restore(0)
    assert len(list(session.stream("one", SHORT))) == 4


def test_what_was_said_can_be_read_when_the_session_is_closed(llm: LLM) -> None:
    with llm.session("Be brief.") as session:
        session.say("one", SHORT)
        stream = session.stream("two", LONG)
        next(stream)
    said, num_tokens = session.messages, session.num_tokens
    assert questions(said) == ["one"]
    assert [each["role"] for each in said] == ["system", "user", "assistant"]
    stream.close()
    assert (session.messages, session.num_tokens) == (said, num_tokens)
    assert session._encoder._pieces == {}
    for closed in (lambda: session.say("three"), session.fork, session.snapshot):
        with pytest.raises(RequestError, match="closed"):
            closed()


def test_a_fork_knows_its_parents_snapshots_and_makes_its_own(llm: LLM) -> None:
    session = llm.session()
    start = session.snapshot()
    session.say("one", SHORT)
    branch = session.fork()
    later = branch.snapshot()
    assert later != start
    branch.restore(start)
    assert branch.messages == []
    branch.restore(later)
    assert branch.messages == session.messages
    with pytest.raises(RequestError, match=f"no snapshot {later}"):
        session.restore(later)
