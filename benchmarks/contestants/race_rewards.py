"""Rewards of two groups, called as TRL does."""

from typing import Any


def short(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward of brevity."""
    return [-float(len(text)) for text in completions]


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward of vowels."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
