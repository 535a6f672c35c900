"""Conversations as text: transcripts, or what a tokenizer's chat template makes of them.

A transcript has the form of the Anthropic HH data, ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``; the prompt
ends after the marker of the assistant's turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TypeGuard

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import CheckedSettings

Message = Mapping[str, Any]
Text = str | Sequence[Message]

ASSISTANT_TURN = "\n\nAssistant:"
_HUMAN_START = re.compile(r"\s*Human:")
_SPEAKERS = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant"}

_MARK = "\ue000"  # of the private use area: no text holds it, and no template trims it
_SYSTEM_FIRST = (
    "{%%- if not messages or messages[0]['role'] != 'system' -%%}"
    "{%%- set messages = [{'role': 'system', 'content': %s}] + messages -%%}{%%- endif -%%}"
)


def is_conversational(text: Text) -> TypeGuard[Sequence[Message]]:
    """Whether a text is a list of messages."""
    return not isinstance(text, str)


def turns_of(prompt: Text, completion: Text) -> list[Message]:
    """Return one conversation of a prompt and what answers it.

    A string is a turn. An answer to a prompt that ends within the assistant's turn goes on with that turn.
    """
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else [*prompt]
    answer = [*_as_messages(completion)]
    if answer and ends_within_turn(opening) and speaker_of(answer[0]) == "Assistant":
        begun = opening.pop()
        answer[0] = {**begun, **answer[0], "content": begun["content"] + answer[0]["content"]}
    return [*opening, *answer]


def as_transcript(prompt: Any, responses: Sequence[Any]) -> tuple[str, list[str]]:
    """Return prompt and responses of :func:`split_prompt` as strings, conversations as transcripts.

    Example:
        >>> as_transcript(*split_prompt([{"role": "user", "content": "Hi"}], ["A", "B"], 0, "ab"))
        ('\\n\\nHuman: Hi\\n\\nAssistant:', [' A', ' B'])
    """
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
        messages = (message if isinstance(message, dict) else {} for message in value)
        if all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
            return value
        raise UserError(
            f"row {row}: column {column!r} holds a list that is no conversation; every message needs "
            "a role and a content, both text"
        )
    held = "an empty list" if value == [] else type(value).__name__
    raise UserError(f"row {row}: column {column!r} holds {held}, not text; drop the row or mend it")


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
        turns = list(zip(*([(m["role"], m["content"]) for m in side] for side in sides), strict=False))[:-1]
        shared = sum(1 for _ in takewhile(lambda turn: len(set(turn)) == 1, turns))
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


def set_chat_template(
    tokenizer: Any, chat_template: str | None = None, system_prompt: str | None = None
) -> Any:
    """Give a tokenizer the chat template that all stages then read, and save, with it.

    Args:
        tokenizer: changed in place.
        chat_template: a Jinja template or the path of one; ``"none"`` for transcripts; None keeps the
            tokenizer's own.
        system_prompt: opens every conversation that has no system message.

    Returns:
        The tokenizer.

    Raises:
        UserError: for a system prompt without a template, and for a template that does not render.
    """
    if chat_template == "none":
        tokenizer.chat_template = None
    elif chat_template is not None:
        path = Path(chat_template)
        if "{" not in chat_template and not path.is_file():
            raise UserError(
                f"--chat_template {chat_template!r} is no file and no Jinja template; give one, or none"
            )
        tokenizer.chat_template = chat_template if "{" in chat_template else path.read_text()
    if system_prompt is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--system_prompt needs a chat template, and this tokenizer has none; give --chat_template"
            )
        first = _SYSTEM_FIRST % json.dumps(system_prompt, ensure_ascii=False)
        template = tokenizer.chat_template
        if isinstance(template, dict):  # one for plain chat, others for tools or retrieval
            tokenizer.chat_template = {name: first + each for name, each in template.items()}
        else:
            tokenizer.chat_template = first + template
    if (chat_template is not None or system_prompt is not None) and tokenizer.chat_template:
        ChatTemplate(tokenizer).prompt([{"role": "user", "content": "a"}])
    return tokenizer


class SplitText(NamedTuple):
    """A completion behind its prompt.

    Attributes:
        start: what stands before it.
        answer: the completion.
        closed: whether it holds the token that ends it.
    """

    start: str
    answer: str
    closed: bool = False


class ChatTemplate:
    """Renders conversations, and parts answers from what stands before them, whatever the template does.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def prompt(self, prompt: Sequence[Message]) -> str:
        """Render a prompt, with the marker of the assistant's turn, or as far as that turn is begun."""
        if ends_within_turn(prompt):
            return self._around(prompt, len(prompt) - 1)[0]
        return self._render(prompt, add_generation_prompt=True)

    def whole(self, turns: Sequence[Message], ended: bool = True) -> str:
        """Render a conversation, without the end of its last turn where that was cut off."""
        return self._render(turns) if ended else self._around(turns, len(turns) - 1)[0]

    def split(self, prompt: Text, completion: Text, ended: bool = True) -> SplitText:
        """Part what a completion adds from what stands before it.

        Args:
            prompt: a string is a turn of the user.
            completion: a string is a turn of the assistant, or goes on with one that the prompt has begun.
            ended: whether it has an end; it was cut off if not.

        Raises:
            UserError: for a template that refuses the conversation, or in which the two cannot be parted.
        """
        opening, turns = turns_of(prompt, []), turns_of(prompt, completion)
        last, content = len(turns) - 1, turns[-1]["content"]
        if len(turns) == len(opening):  # words that go on with a turn are no template's to change
            start, tail = self._around(opening, last)
            answer = content[len(opening[-1]["content"]) :]
        else:
            text, tail = self._around(turns, last)
            if ended and (not content or content[-1].isspace()):  # the mark keeps white space from a trim
                whole = self._render(turns)
                text = whole.removesuffix(tail) if whole.endswith(tail) else text
            start = self._start(opening, turns, text)
            answer = text[len(start) :]
        if not ended:
            return SplitText(start, answer)
        end = self._turn_end.match(tail)
        return SplitText(start, answer + (end[0] if end else tail.rstrip()), bool(end))

    @cached_property
    def puts_space(self) -> bool:
        """Whether a space parts an answer from the marker of its turn."""
        return self.split([{"role": "user", "content": "a"}], "b").answer.startswith(" ")

    def _start(self, opening: Sequence[Message], turns: Sequence[Message], text: str) -> str:
        """What stands before the answer in a rendered conversation: the prompt, in most templates."""
        prompt = self.prompt(opening)
        if text.startswith(prompt):
            return prompt
        # it opens a thought, or writes the last turn of a user in another way
        place = len(opening) - ends_within_turn(opening)
        empty = opening[place] if place < len(opening) else {**turns[place], "content": ""}
        start, _ = self._around([*turns[:place], empty, *turns[place + 1 :]], place)
        # a space that the prompt lacks is the answer's
        bare = start.rstrip() + prompt[len(prompt.rstrip()) :]
        start = bare if start.startswith(bare) else start
        if not text.startswith(start):
            raise UserError(
                "the chat template writes what stands before an answer by the answer itself, so that the two "
                f"cannot be parted; give another --chat_template (a row is rendered as {shorten(text, 80)!r})"
            )
        return start

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        """Match the first special token that a template writes behind an answer (Phi-3 writes two)."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, special)) or '(?!)'})")

    def _around(self, messages: Sequence[Message], place: int) -> tuple[str, str]:
        """Render a conversation, and return what stands before and behind the end of one of its messages."""
        message = {**messages[place], "content": messages[place]["content"] + _MARK}
        rendered = self._render([*messages[:place], message, *messages[place + 1 :]])
        text, mark, tail = rendered.rpartition(_MARK)
        if not mark:
            raise UserError(
                "the chat template leaves out the words of an answer; give another --chat_template"
            )
        return text, tail

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # Jinja's own, and what a template raises of conversations
            reason = " ".join(str(error).split()) or type(error).__name__
            shown = shorten(" / ".join(f"{m.get('role')}: {m.get('content')}" for m in messages), 80)
            raise UserError(
                f"the chat template refuses a conversation ({reason}); mend the row that begins {shown!r}"
            ) from error


@dataclass(kw_only=True)
class ChatSettings(CheckedSettings):
    """Settings of how conversations become text.

    Args:
        chat_template: for prompts that are lists of messages; a Jinja template or the file of one, none
            for plain transcripts, the tokenizer's own when left out.
        system_prompt: opens every conversation that has no system message; saved with the tokenizer.
    """

    chat_template: str | None = None
    system_prompt: str | None = None

    def apply_chat(self, tokenizer: Any) -> Any:
        """Give a tokenizer the template of these settings; returns it."""
        return set_chat_template(tokenizer, self.chat_template, self.system_prompt)
