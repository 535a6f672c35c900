"""Judges by name, as a user would write them."""

calls = []


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
