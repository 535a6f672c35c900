"""Texts of a language model as tokens: the one place that training, sampling and scoring share.

A text is a string, or a conversation as Hugging Face's chat templates have it: a list of messages with
``role`` and ``content``. Conversations go through the tokenizer's chat template where it has one, and become
transcripts (:mod:`torchrl_maxmin.preferences.transcripts`) where not. Strings stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences.transcripts import (
    Message,
    as_transcript,
    ends_within_turn,
    prompt_and_responses,
    render_prompt,
    speaker_of,
    text_of,
)

__all__ = [
    "Message",
    "Text",
    "TextEncoder",
    "as_completion",
    "cut_start",
    "distinct_texts",
    "is_conversational",
    "plain_text",
    "read_texts",
    "set_chat_template",
    "text_key",
    "turns_of",
]

Text = str | Sequence[Message]

_MARK = "\ue000"  # of the private use area: no text holds it, and no template trims it

_SYSTEM_FIRST = (
    "{%%- if not messages or messages[0]['role'] != 'system' -%%}"
    "{%%- set messages = [{'role': 'system', 'content': %s}] + messages -%%}{%%- endif -%%}"
)


def is_conversational(text: Text) -> bool:
    """Whether a text is a list of messages."""
    return not isinstance(text, str)


def text_key(text: Text) -> str:
    """Return a string that equal texts share, to hash or to sort them by."""
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)


def distinct_texts(texts: Sequence[Text]) -> list[int]:
    """Return the place of the first of every group of equal texts, in order.

    Example:
        >>> distinct_texts(["a", "b", "a"])
        [0, 1]
    """
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text_key(text), place)
    return list(first.values())


def plain_text(text: Text) -> str:
    """Return a string as it is, a lone message's words, and a longer conversation as a transcript."""
    if isinstance(text, str):
        return text
    return text[0]["content"] if len(text) == 1 else as_transcript([], [text])[1][0].strip()


def as_completion(text: str, prompt: Text) -> Text:
    """Return what answers a prompt in the prompt's kind: a string, or a message of the assistant."""
    return [{"role": "assistant", "content": text}] if is_conversational(prompt) else text


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
        answer[0] = {**begun, "content": begun["content"] + answer[0]["content"]}
    return [*opening, *answer]


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
        first, template = (
            _SYSTEM_FIRST % json.dumps(system_prompt, ensure_ascii=False),
            tokenizer.chat_template,
        )
        named = isinstance(template, dict)  # one for plain chat, others for tools or retrieval
        tokenizer.chat_template = (
            {name: first + each for name, each in template.items()} if named else first + template
        )
    if chat_template is not None or system_prompt is not None:
        TextEncoder(tokenizer).prompts([[{"role": "user", "content": "a"}]])
    return tokenizer


def cut_start(ids: list[int], max_length: int | None, bos_token_id: int | None = None) -> list[int]:
    """Return at most ``max_length`` tokens: those at the end, and BOS before them where there was one.

    Example:
        >>> cut_start([1, 5, 6, 7], 3, bos_token_id=1)
        [1, 6, 7]
    """
    if max_length is None or len(ids) <= max_length:
        return ids
    if max_length > 1 and ids[0] == bos_token_id:
        return [bos_token_id, *ids[1 - max_length :]]
    return ids[-max_length:]


class _Split(NamedTuple):
    """What stands before a completion, the completion, and whether it holds the token that ends it."""

    start: str
    answer: str
    closed: bool


class TextEncoder:
    """Turns prompts and completions into the tokens that a language model is trained on and answers to.

    A prompt is what the tokenizer makes of it, without the EOS that some append, or the chat template with
    the marker of the assistant's turn. A completion is the tokens behind the prompt's, as when a policy
    answers it, and ends with EOS, or with the token that ends a turn in the template.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Example:
        >>> from torchrl_maxmin.world import build_tokenizer
        >>> encoder = TextEncoder(build_tokenizer())
        >>> prompt, whole = encoder.prompts(["the film"]), encoder(["the film"], ["was great ."])
        >>> whole[0][: len(prompt[0])] == prompt[0], whole[0][-1] == encoder.tokenizer.eos_token_id
        (True, True)
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        extra = len(whole) - len(plain)
        starts = [i for i in range(extra + 1) if whole[i : i + len(plain)] == plain]
        if not plain:  # a vocabulary without this letter
            starts = [int(whole[:1] == [tokenizer.bos_token_id])]
        self._suffix = extra - starts[0] if starts else 0
        two, one, other = self._ids(["\na", "\n", "a"], special=False)
        self._has_prefix = two != [*one, *other]  # Llama 2 puts a space before every text

    @property
    def has_template(self) -> bool:
        """Whether conversations go through a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def turn_end(self) -> int | None:
        """The token that ends the assistant's turn in the chat template; None where it is EOS or nothing."""
        if not self.has_template:
            return None
        (row,) = self.completions([[{"role": "user", "content": "a"}]], ["b"])
        return row[-1] if row and row[-1] != self.tokenizer.eos_token_id else None

    def prompts(
        self, prompts: Sequence[Text], max_length: int | None = None, *, answerable: bool = True
    ) -> list[list[int]]:
        """Tokenize prompts.

        Args:
            prompts: strings or conversations.
            max_length: most tokens; longer prompts lose their start, but for BOS.
            answerable: refuse a prompt without a token, which no policy can answer.

        Returns:
            One list of ids each.

        Raises:
            UserError: for an empty prompt where the tokenizer has no BOS, and for a conversation that the
                chat template refuses.
        """
        rows = self._by_kind(prompts, [is_conversational(prompt) for prompt in prompts])
        bos = self.tokenizer.bos_token_id
        for place, row in enumerate(rows):
            if not row and bos is not None:
                rows[place] = [bos]
            elif not row and answerable:
                raise UserError(
                    f"prompt {place} is empty and the tokenizer has no BOS token to begin a text with; "
                    "drop such prompts"
                )
        return [cut_start(row, max_length, bos) for row in rows]

    def completions(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[list[int]]:
        """Tokenize completions of prompts.

        Args:
            prompts: N strings or conversations.
            completions: N strings or lists of messages.
            ended: whether each has an end; one that was cut off gets none. All have when None.

        Returns:
            One list of ids each.
        """
        ended = [True] * len(completions) if ended is None else ended
        rows, turn_end = zip(prompts, completions, ended, strict=True), self._turn_end()
        parts = [
            self._split(prompt, completion, turn_end if has_end else None)
            for prompt, completion, has_end in rows
        ]
        ids = self._ids([part.answer for part in parts], special=False)
        if self._has_prefix:
            ids = self._without_prefix(parts, ids)
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [
            [*row, *eos] if has_end and not part.closed else row
            for part, row, has_end in zip(parts, ids, ended, strict=True)
        ]

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        max_length: int | None = None,
        ended: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """Tokenize whole texts: prompt and completion, of which longer ones lose their start."""
        prompts = [
            turns_of(prompt, []) if is_conversational(completion) else prompt
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        starts = self.prompts(prompts, answerable=False)
        ends = self.completions(prompts, completions, ended)
        bos = self.tokenizer.bos_token_id
        return [cut_start([*a, *b], max_length, bos) for a, b in zip(starts, ends, strict=True)]

    def conversations(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[str]:
        """Render whole conversations by the chat template; strings are turns."""
        ended = [True] * len(completions) if ended is None else ended
        conversations = [turns_of(*texts) for texts in zip(prompts, completions, strict=True)]
        return [
            self._render(turns) if has_end else self._render_up_to(turns, len(turns) - 1)
            for turns, has_end in zip(conversations, ended, strict=True)
        ]

    # -- parts ------------------------------------------------------------------------------------

    def _by_kind(self, prompts: Sequence[Text], conversational: Sequence[bool]) -> list[list[int]]:
        """Token rows of prompts, each kind in one call of the tokenizer."""
        rows: list[list[int]] = [[] for _ in prompts]
        bos = self.tokenizer.bos_token_id
        through_template = [self.has_template and chat for chat in conversational]
        for template in (False, True):
            places = [i for i, chosen in enumerate(through_template) if chosen == template]
            if not places:
                continue
            texts = [self.prompt_text(prompts[i]) for i in places]
            for i, row in zip(places, self._ids(texts, special=not template), strict=True):
                row = row[: len(row) - self._suffix] if self._suffix and not template else row
                # a string that begins with BOS, which the tokenizer has put before it once more
                rows[i] = row[1:] if not template and row[:2] == [bos, bos] else row
        return rows

    def prompt_text(self, prompt: Text) -> str:
        """Render a prompt as the text that is tokenized."""
        if isinstance(prompt, str):
            return prompt
        if not self.has_template:
            return render_prompt(prompt)
        if ends_within_turn(prompt):
            return self._render_up_to(prompt, len(prompt) - 1)
        return self._render(prompt, add_generation_prompt=True)

    def _split(self, prompt: Text, completion: Text, turn_end: re.Pattern[str] | None) -> _Split:
        """Part what a completion adds from what stands before it; without a turn's end it was cut off."""
        if not is_conversational(prompt) and not is_conversational(completion):
            return _Split("", str(completion), False)
        if not self.has_template:
            _, (answer,) = prompt_and_responses(prompt, [completion], 0, ["completion"])
            return _Split("", answer, False)
        opening, turns = turns_of(prompt, []), turns_of(prompt, completion)
        text = self._render(turns) if turn_end else self._render_up_to(turns, len(turns) - 1)
        start = self.prompt_text(opening)
        if not text.startswith(start):  # it opens a thought, or writes the last turn of a user otherwise
            begun = ends_within_turn(opening)
            place = len(opening) - begun
            empty = opening[-1] if begun else {**turns[place], "content": ""}
            start = self._render_up_to([*turns[:place], empty, *turns[place + 1 :]], place)
        if not text.startswith(start):
            shown = shorten(text, 80)
            raise UserError(
                "the chat template writes what stands before an answer by the answer itself, so that the two "
                f"cannot be parted; give another --chat_template (the row is rendered as {shown!r})"
            )
        answer = text[len(start) :]
        if not turn_end:
            return _Split(start, answer, False)
        end = turn_end.search(answer)
        return _Split(start, answer[: end.end(1)], True) if end else _Split(start, answer.rstrip(), False)

    def _without_prefix(self, parts: Sequence[_Split], alone: list[list[int]]) -> list[list[int]]:
        """Token rows of answers behind what stands before them, where the tokens part there."""
        starts = self._ids([part.start for part in parts], special=False)
        wholes = self._ids([part.start + part.answer for part in parts], special=False)
        return [
            whole[len(start) :] if part.start and whole[: len(start)] == start else row
            for part, start, whole, row in zip(parts, starts, wholes, alone, strict=True)
        ]

    def _turn_end(self) -> re.Pattern[str]:
        """Match the special tokens that end a text; the first ends the turn (Phi-3 puts EOS behind it)."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        either = "|".join(map(re.escape, special)) or r"(?!)"
        return re.compile(rf"({either})(?:\s*(?:{either}))*\s*\Z")

    def _render_up_to(self, messages: Sequence[Message], place: int) -> str:
        """Render a conversation, and return what stands before the end of one of its messages."""
        message = {**messages[place], "content": messages[place]["content"] + _MARK}
        text, mark, _ = self._render([*messages[:place], message, *messages[place + 1 :]]).rpartition(_MARK)
        if not mark:
            raise UserError(
                "the chat template leaves out the words of an answer; give another --chat_template"
            )
        return text

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # Jinja's own, and what a template raises of conversations
            reason = " ".join(str(error).split()) or type(error).__name__
            shown = shorten(" / ".join(f"{m.get('role')}: {m.get('content')}" for m in messages), 80)
            raise UserError(
                f"the chat template refuses a conversation ({reason}); mend the row that begins {shown!r}"
            ) from error

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special).input_ids if texts else []


def read_texts(table: Any, column: str) -> list[Text]:
    """Return a column of strings or conversations.

    Raises:
        UserError: for a cell that is neither; the message names row and column.
    """
    return [text_of(value, row, column) for row, value in enumerate(table[column][:])]
