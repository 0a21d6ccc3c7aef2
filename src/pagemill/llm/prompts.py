"""Conversations to prompts: the model's template, its vocabulary, and what keeps clients from writing control tokens.
Owns the call of the three together; each is in `text/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagemill.base.model_spec import VocabSpec
from pagemill.text.conversation import PromptTokens, encode_marked, mark_messages
from pagemill.text.remembered import RememberingEncoder
from pagemill.text.tokenizer import Tokenizer


def chat_prompt(
    vocab: VocabSpec,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    encoder: RememberingEncoder | None = None,
) -> PromptTokens:
    """A conversation as ids. Control tokens are those of the template alone; spelt out in a message they are text.

    template: in place of the model's own. tools, variables: names for the template. encoder: of the tokeniser, that of
    a conversation which remembers what it has encoded. Raises RequestError for messages
    that are malformed or refused, and ModelError where there is no template or it is broken.
    """
    from pagemill.text.chat import render_chat  # what starts processes, which only conversations need

    marked = mark_messages(messages, tuple(tokenizer.special_texts), tools)
    names: dict[str, Any] = dict(variables or {})
    if marked.tools:
        names["tools"] = list(marked.tools)
    text = render_chat(
        template if template is not None else vocab.chat_template,
        marked.messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=text_of(vocab.bos_id, tokenizer),
        eos_token=text_of(vocab.eos_id, tokenizer),
        **names,
    )
    return encode_marked(text, marked, encoder or tokenizer, tokenizer.special_texts)


def text_of(token_id: int | None, tokenizer: Tokenizer | None) -> str:
    """One token as text, control tokens spelt out; empty without a token or a vocabulary."""
    return "" if token_id is None or tokenizer is None else tokenizer.decode([token_id], skip_special=False)
