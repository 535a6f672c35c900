"""Settings of chat templates, as the stages take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_maxmin.core.settings import CheckedSettings
from torchrl_maxmin.preferences.texts import set_chat_template

__all__ = ["ChatSettings"]


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
