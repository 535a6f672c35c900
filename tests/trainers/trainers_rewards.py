"""Reward functions of the tests, found by name as a user's would be."""

import math


def brevity(prompts, completions):
    return [-len(c.split()) / 10 for c in completions]


def letters(prompts, completions):
    """How early in the alphabet the words start."""
    return [sum(math.cos(ord(w[0])) for w in c.split()) for c in completions]


def letters_plus_five(prompts, completions):
    return [value + 5 for value in letters(prompts, completions)]


def both(prompts, completions):
    return [
        list(pair) for pair in zip(brevity(prompts, completions), letters(prompts, completions), strict=True)
    ]


def constant(prompts, completions):
    return [1.0] * len(completions)


class Poisoned:
    """NaN in one reward from a given call on."""

    def __init__(self):
        self.calls_left = 10**9

    def __call__(self, prompts, completions):
        values = letters(prompts, completions)
        self.calls_left -= 1
        if self.calls_left < 0:
            values[1] = float("nan")
        return values


poisoned = Poisoned()


def letters_by_prompt(prompts, completions):
    """``letters`` with an offset of its own for every prompt."""
    return [
        value + 7 * math.sin(len(prompt))
        for prompt, value in zip(prompts, letters(prompts, completions), strict=True)
    ]
