"""Texts of a language model as tokens: the one place that training, sampling and scoring share.

A text is a string, or a conversation as Hugging Face's chat templates have it: a list of messages with
``role`` and ``content``. Conversations go through the tokenizer's chat template where it has one, and become
transcripts (:mod:`torchrl_maxmin.preferences.chat`) where not. Strings stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import (
    ChatTemplate,
    SplitText,
    Text,
    as_transcript,
    ends_within_turn,
    is_conversational,
    render_prompt,
    split_prompt,
    text_of,
    turns_of,
)


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


def with_one_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the tokens of a string, without the BOS that was put before one that begins with it."""
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


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
        rows = self._by_kind(prompts)
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
        parts = [self._split(*texts) for texts in zip(prompts, completions, ended, strict=True)]
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
        rows = zip(prompts, completions, ended, strict=True)
        return [self._template.whole(turns_of(prompt, answer), has_end) for prompt, answer, has_end in rows]

    def completion(self, prompt: Text, text: str) -> Text:
        """Return what a policy wrote as a completion of the prompt's kind.

        The space that parts an answer from the marker of its turn is no part of the message.
        """
        if not is_conversational(prompt):
            return text
        whole_turn = not ends_within_turn(prompt)
        if whole_turn and (not self.has_template or self._template.puts_space):
            text = text.removeprefix(" ")
        return as_completion(text, prompt)

    # -- parts ------------------------------------------------------------------------------------

    def _by_kind(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Token rows of prompts, each kind in one call of the tokenizer."""
        rows: list[list[int]] = [[] for _ in prompts]
        through_template = [self.has_template and is_conversational(prompt) for prompt in prompts]
        for template in (False, True):
            places = [i for i, chosen in enumerate(through_template) if chosen == template]
            texts = [self.prompt_text(prompts[i]) for i in places]
            for i, row in zip(places, self._ids(texts, special=not template), strict=True):
                row = row[: len(row) - self._suffix] if self._suffix and not template else row
                rows[i] = row if template else with_one_bos(row, self.tokenizer)
        return rows

    def prompt_text(self, prompt: Text) -> str:
        """Render a prompt as the text that is tokenized."""
        if not is_conversational(prompt):
            return str(prompt)
        return self._template.prompt(prompt) if self.has_template else render_prompt(prompt)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _split(self, prompt: Text, completion: Text, ended: bool) -> SplitText:
        if not is_conversational(prompt) and not is_conversational(completion):
            return SplitText("", str(completion))
        if self.has_template:
            return self._template.split(prompt, completion, ended)
        start, (answer,) = as_transcript(*split_prompt(prompt, [completion], 0, ["completion"]))
        return SplitText(start, answer)

    def _without_prefix(self, parts: Sequence[SplitText], alone: list[list[int]]) -> list[list[int]]:
        """Token rows of answers behind what stands before them, where the tokens part there."""
        starts = self._ids([part.start for part in parts], special=False)
        wholes = self._ids([part.start + part.answer for part in parts], special=False)
        return [
            whole[len(start) :] if part.start and whole[: len(start)] == start else row
            for part, start, whole, row in zip(parts, starts, wholes, alone, strict=True)
        ]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special).input_ids if texts else []


def read_texts(table: Any, column: str) -> list[Text]:
    """Return a column of strings or conversations.

    Raises:
        UserError: for a cell that is neither; the message names row and column.
    """
    return [text_of(value, row, column) for row, value in enumerate(table[column][:])]


def encode(tokenizer: Any, prompt: Text, completion: Text, max_length: int | None = None) -> list[int]:
    """Return the token ids of one text: prompt, completion and EOS, as :class:`TextEncoder` makes them.

    Longer texts lose tokens of the prompt's start, but for BOS, and never the end that a score is read at.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: a string or a list of messages.
        completion: likewise.
        max_length: most tokens.
    """
    return TextEncoder(tokenizer)([prompt], [completion], max_length)[0]
