"""Conversations as the prompt and the responses that differ, in plain text.

Messages become the transcript form of the Anthropic HH data, ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``;
the prompt ends after the marker of the assistant's turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torchrl_maxmin.core.errors import UserError

__all__ = [
    "ASSISTANT_TURN",
    "Message",
    "Text",
    "as_transcript",
    "ends_within_turn",
    "is_conversational",
    "prompt_and_responses",
    "render_prompt",
    "speaker_of",
    "split_prompt",
    "text_of",
    "turns_of",
]

Message = Mapping[str, Any]
Text = str | Sequence[Message]

ASSISTANT_TURN = "\n\nAssistant:"
_HUMAN_START = re.compile(r"\s*Human:")
_SPEAKERS = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant"}


def is_conversational(text: Text) -> TypeGuard[Sequence[Message]]:
    """Whether a text is a list of messages."""
    return not isinstance(text, str)


def turns_of(prompt: Text, completion: Text) -> list[Message]:
    """Return one conversation of a prompt and what answers it.

    A string is a turn. An answer to a prompt that ends within the assistant's turn goes on with that turn.
    """
    opening: list[Any] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else [*prompt]
    )
    answer: list[Any] = (
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else [*completion]
    )
    if answer and ends_within_turn(opening) and speaker_of(answer[0]) == "Assistant":
        begun = opening.pop()
        answer[0] = {**begun, **answer[0], "content": begun["content"] + answer[0]["content"]}
    return [*opening, *answer]


def prompt_and_responses(
    prompt: Any, responses: Sequence[Any], row: int, columns: Sequence[str]
) -> tuple[str, list[str]]:
    """Return :func:`split_prompt`'s texts as strings, conversations as transcripts.

    Example:
        >>> shared = "\\n\\nHuman: Hi\\n\\nAssistant:"
        >>> prompt_and_responses(None, [shared + " A", shared + " B"], 0, "ab")
        ('\\n\\nHuman: Hi\\n\\nAssistant:', [' A', ' B'])
        >>> prompt_and_responses([{"role": "user", "content": "Hi"}], ["A", "B"], 0, "ab")
        ('\\n\\nHuman: Hi\\n\\nAssistant:', [' A', ' B'])
    """
    return as_transcript(*split_prompt(prompt, responses, row, columns))


def as_transcript(prompt: Any, responses: Sequence[Any]) -> tuple[str, list[str]]:
    """Return prompt and responses of :func:`split_prompt` as strings."""
    if isinstance(prompt, str):
        return prompt, list(responses)
    if ends_within_turn(prompt):
        return render_prompt(prompt), [first["content"] + _render(rest) for first, *rest in responses]
    turns = [_render(response).removeprefix(ASSISTANT_TURN) for response in responses]
    return render_prompt(prompt), turns


def split_prompt(
    prompt: Any, responses: Sequence[Any], row: int, columns: Sequence[str]
) -> tuple[Any, list[Any]]:
    """Split what a row holds into a prompt and the responses that answer it.

    Whole transcripts (strings that begin with ``Human:``, or messages that do not begin with the
    assistant) carry their prompt: what they share, up to the assistant's turn in which they part.

    Args:
        prompt: a string, a list of messages ``{role, content}``, or None where it is implicit.
        responses: one or more strings or lists of messages.
        row: number of the row, for messages.
        columns: where the responses come from, for messages.

    Returns:
        Strings, or, where one of them is a conversation, lists of messages throughout.

    Raises:
        UserError: for anything that is no text, and for transcripts that share no turn.
    """
    texts = [text_of(value, row, column) for value, column in zip(responses, columns, strict=True)]
    if isinstance(prompt, str) or prompt is None:
        if all(isinstance(text, str) for text in texts):
            whole = prompt is None or all(_HUMAN_START.match(text) for text in texts)
            cut = _shared_turns(texts) if whole else 0
            if cut:
                return texts[0][:cut], [text[cut:] for text in texts]
            if prompt is not None:
                return prompt, texts
            raise UserError(
                f"row {row}: there is no prompt, and the responses are no transcripts that share a turn of "
                f"{ASSISTANT_TURN.strip()!r}; add a prompt column"
            )
    else:
        prompt = text_of(prompt, row, "prompt")
    return _split_messages(prompt, [_as_messages(text) for text in texts], row)


def text_of(value: Any, row: int, column: str) -> Any:
    """Return the value, if it is a string or messages; a list of one string is that string.

    Raises:
        UserError: for anything else; the message names row and column.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        if all(_is_message(message) for message in value):
            return value
        raise UserError(
            f"row {row}: column {column!r} holds a list that is no conversation; every message needs "
            "a role and a content, both text"
        )
    held = "an empty list" if value == [] else type(value).__name__
    raise UserError(f"row {row}: column {column!r} holds {held}, not text; drop the row or mend it")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _as_messages(text: Any) -> list[Message]:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def _shared_turns(texts: list[str]) -> int:
    """How many characters the transcripts share, up to the last marker of an assistant's turn among them."""
    first, cut = texts[0], 0
    while (turn := first.find(ASSISTANT_TURN, cut)) >= 0:
        end = turn + len(ASSISTANT_TURN)
        if not all(text.startswith(first[:end]) for text in texts):
            break
        cut = end
    return cut


def _split_messages(
    prompt: Any, sides: list[list[Message]], row: int
) -> tuple[list[Message], list[list[Message]]]:
    if speaker_of(sides[0][0]) != "Assistant":  # whole conversations repeat the prompt
        shared = 0
        shortest = min(len(side) for side in sides)
        while shared < shortest - 1 and all(_same(side[shared], sides[0][shared]) for side in sides):
            shared += 1
        while shared and ends_within_turn(sides[0][:shared]):  # a whole turn, which no answer goes on with
            shared -= 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or any(speaker_of(side[0]) != "Assistant" for side in sides):
        raise UserError(
            f"row {row}: the conversations do not part at a turn of the assistant after a shared beginning; "
            "give a prompt, and responses that begin with the assistant"
        )
    return prompt, sides


def _same(one: Message, other: Message) -> bool:
    return (one["role"], one["content"]) == (other["role"], other["content"])


def speaker_of(message: Message) -> str:
    """Return ``Human``, ``Assistant`` or what else the role of a message is called in a transcript."""
    return _SPEAKERS.get(message["role"].lower(), message["role"].capitalize())


def ends_within_turn(messages: Sequence[Message]) -> bool:
    """Whether a conversation ends with words of the assistant, which an answer goes on with."""
    return bool(messages) and speaker_of(messages[-1]) == "Assistant"


def _render(messages: Sequence[Message]) -> str:
    return "".join(f"\n\n{speaker_of(message)}: {message['content']}" for message in messages)


def render_prompt(messages: Sequence[Message]) -> str:
    """Return messages as a transcript that ends where the assistant answers."""
    return _render(messages) + ("" if ends_within_turn(messages) else ASSISTANT_TURN)
