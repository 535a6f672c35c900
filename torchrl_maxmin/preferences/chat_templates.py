"""Conversations through a tokenizer's chat template: what is asked, what is answered, what ends a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.transcripts import Message, Text, ends_within_turn, turns_of

__all__ = ["ChatTemplate", "SplitText", "set_chat_template"]

_MARK = "\ue000"  # of the private use area: no text holds it, and no template trims it
_SYSTEM_FIRST = (
    "{%%- if not messages or messages[0]['role'] != 'system' -%%}"
    "{%%- set messages = [{'role': 'system', 'content': %s}] + messages -%%}{%%- endif -%%}"
)


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
    if chat_template is not None:
        path = Path(chat_template)
        if "{" not in chat_template and chat_template != "none" and not path.is_file():
            raise UserError(
                f"--chat_template {chat_template!r} is no file and no Jinja template; give one, or none"
            )
        if chat_template == "none":
            tokenizer.chat_template = None
        else:
            tokenizer.chat_template = chat_template if "{" in chat_template else path.read_text()
    if system_prompt is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--system_prompt needs a chat template, and this tokenizer has none; give --chat_template"
            )
        first = _SYSTEM_FIRST % json.dumps(system_prompt, ensure_ascii=False)
        template = tokenizer.chat_template
        named = isinstance(template, dict)  # one for plain chat, others for tools or retrieval
        tokenizer.chat_template = (
            {name: first + each for name, each in template.items()} if named else first + template
        )
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
