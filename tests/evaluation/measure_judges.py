"""Judges by name, as a user would write them."""

import time

calls = []
compared = []


def words(prompts, completions):
    """Two columns: words of the prompt, words of the completion."""
    calls.append((list(prompts), list(completions)))
    return [[float(len(p.split())), float(len(c.split()))] for p, c in zip(prompts, completions, strict=True)]


def brevity(prompts, completions):
    return [-float(len(c)) for c in completions]


def broken(prompts, completions):
    raise KeyError("no such key")


def unequal(prompts, completions):
    return [1.0] * (len(prompts) + 1)


def undefined(prompts, completions):
    return [float("nan") for _ in prompts]


nothing = 3


known = set()


def looks_up(prompts, completions):
    """As one that has an answer to every prompt of the data, and to no other."""
    if not known.issuperset(prompts):
        raise KeyError(prompts)
    return brevity(prompts, completions)


def looks_up_pairs(prompts, a, b):
    if not known.issuperset(prompts):
        raise KeyError(prompts)
    return shorter(prompts, a, b)


def shorter(prompts, a, b):
    """Which of two is the shorter one."""
    compared.append((list(prompts), list(a), list(b)))
    return [0.5 + 0.5 * ((len(y) > len(x)) - (len(y) < len(x))) for x, y in zip(a, b, strict=True)]


def sure(prompts, a, b):
    return [1.5] * len(prompts)


by_group = {"brief": shorter, "first": lambda prompts, a, b: [1.0] * len(prompts)}


def hangs(prompts, completions):
    time.sleep(600)


def hangs_at_pairs(prompts, a, b):
    time.sleep(600)
