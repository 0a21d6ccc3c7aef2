"""A conversation with branches. Owns its messages; what branches have in common is shared by the prefix cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from pagemill.base.errors import RequestError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.engine.output import Delta
from pagemill.llm.outputs import RequestOutput
from pagemill.text.remembered import RememberingEncoder

if TYPE_CHECKING:
    from pagemill.llm.api import LLM

Messages = tuple[dict[str, str], ...]


class Session:
    """Messages so far, and the ids of the last prompt's text. Mutated by `say`, `stream`, `restore` and `close`.

        with llm.session(system="Be brief.") as session:
            session.say("Hello").outputs[0].text
            mark = session.snapshot()
            other = session.fork()

    An answer that ends in an error, or is left before its end without a token, adds nothing to the conversation.
    One answer at a time: while one is under way, for whatever thread, `say`, `stream` and `restore` raise RequestError
    (409). A fork may answer at the same time; it begins with what was said before.
    """

    def __init__(self, llm: LLM, system: str | None, options: CacheOptions) -> None:
        self._llm = llm
        self._options = options
        self._messages: Messages = ({"role": "system", "content": system},) if system else ()
        self._marks: list[Messages] = []
        self._encoder = RememberingEncoder(llm.tokenizer)
        self._answering = Lock()
        self._closed = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, a copy; of a closed session, what it was."""
        return [dict(each) for each in self._messages]

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation as the next prompt would begin."""
        return len(self._prompt(self._messages)["prompt_token_ids"]) if self._messages else 0

    def say(self, text: str, params: SamplingParams | None = None) -> RequestOutput:
        """Ask, and keep question and answer (choice 0). Raises what `LLM.generate` raises, and RequestError (409) while
        another answer is under way."""
        with self._alone():
            asked = self._asked(text)
            [output] = self._llm.generate([self._prompt(asked)], params, cache=self._options)
            if output.error is None:
                self._keep(asked, output.outputs[0].text)
            return output

    def stream(self, text: str, params: SamplingParams | None = None) -> Generator[Delta]:
        """The same as deltas; what has been said when the iterator is left is kept, unless it ended in an error. The
        answer is under way from the first delta until the iterator has ended or is closed."""
        with self._alone():
            asked = self._asked(text)
            said: list[str] = []
            failed = False
            stream = self._llm.stream(self._prompt(asked), params, cache=self._options)
            try:
                for delta in stream:
                    if delta.choice == 0:
                        said.append(delta.text)
                    yield delta
            except Exception:
                failed = True
                raise
            finally:
                stream.close()
                if said and not failed:
                    self._keep(asked, "".join(said))

    def fork(self) -> Session:
        """A conversation that goes on from here on its own. It knows the snapshots that were made so far."""
        self._check_open()
        branch = Session(self._llm, None, self._options)
        branch._messages = self._messages
        branch._marks = list(self._marks)
        branch._encoder = self._encoder.copy()
        return branch

    def snapshot(self) -> int:
        """Mark this point; the number is for `restore`."""
        self._check_open()
        self._marks.append(self._messages)
        return len(self._marks) - 1

    def restore(self, mark: int) -> None:
        """Go back to a marked point, or forward again. Raises RequestError for a number that no `snapshot` gave."""
        with self._alone():
            self._check_open()
            if isinstance(mark, bool) or not isinstance(mark, int) or not 0 <= mark < len(self._marks):
                raise RequestError(f"there is no snapshot {mark!r:.40}; there are {len(self._marks)}, counted from 0")
            self._messages = self._marks[mark]

    def close(self) -> None:
        """End the session: `messages` stays to be read, and nothing is added any more. Closing twice is no mistake."""
        self._closed = True
        self._marks = []
        self._encoder.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For one answer, or a change. Raises RequestError where another is under way."""
        if not self._answering.acquire(blocking=False):
            raise RequestError(
                "this session is answering; wait until it has, read or close its open stream, or ask a fork of it",
                status=409,
            )
        try:
            yield
        finally:
            self._answering.release()

    def _keep(self, asked: Messages, answer: str) -> None:
        if not self._closed:
            self._messages = (*asked, {"role": "assistant", "content": answer})

    def _prompt(self, messages: Messages) -> dict[str, Any]:
        return self._llm.chat_prompt(messages, None if self._closed else self._encoder)

    def _asked(self, text: str) -> Messages:
        self._check_open()
        if not isinstance(text, str):
            raise RequestError(f"a message is a {type(text).__name__}; give text")
        return (*self._messages, {"role": "user", "content": text})

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this session is closed; open a new one", status=409)
