"""Reward functions of the tests, found by name as a user's would be."""

import contextlib
import math
import os
import random
import signal
import sys
import time


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


def sparse_letters(prompts, completions):
    """``letters`` of the responses with an even number of words alone."""
    return [
        None if len(c.split()) % 2 else value
        for c, value in zip(completions, letters(prompts, completions), strict=True)
    ]


def for_long_prompts(prompts, completions):
    """What a group gets that is well off at long prompts alone."""
    return [1.0 if len(prompt) > 40 else -1.0 for prompt in prompts]


def for_short_prompts(prompts, completions):
    return [-0.9 if len(prompt) > 40 else 1.0 for prompt in prompts]


calls = [0]


def deadly(prompts, completions):
    """``letters``, until the second of two processes dies at its seventh call, the first time it runs."""
    calls[0] += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ.get("RANK") == "1" and calls[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(prompts, completions)


def murderous(prompts, completions):
    """``letters``, whose fifth call kills a rollout worker of this process's Ray, at work or not."""
    calls[0] += 1
    if calls[0] == 5:
        import psutil

        family = psutil.Process().children(recursive=True)
        workers = [process for process in family if "RayWorker" in "".join(process.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
    return letters(prompts, completions)


class Trouble:
    """``brevity``, and at one call, from 1, something else."""

    def __init__(self):
        self.start()

    def start(self, kind=None, at=0):
        self.kind, self.at, self.calls = kind, at, 0

    def __call__(self, prompts, completions):
        self.calls += 1
        values = brevity(prompts, completions)
        random.random()
        return getattr(self, self.kind)(values) if self.calls == self.at else values

    def raises(self, values):
        raise ValueError("no such\nthing\x1b[2J")

    def exits(self, values):
        sys.exit(3)

    def hangs(self, values):
        while True:  # whatever it handles
            with contextlib.suppress(Exception):
                time.sleep(600)

    def narrows(self, values):
        return values[:-1]

    def widens(self, values):
        return [[value, value] for value in values]

    def speaks(self, values):
        return ["good" for _ in values]

    def undefined(self, values):
        return [*values[:-1], float("nan")]

    def overflows(self, values):
        return [*values[:-1], 1e39]


trouble = Trouble()
