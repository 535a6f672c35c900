"""What simulated users like: two tastes at a time, each a function of prompt and answer alone.

Sentiment is VADER's compound, reading grade the automated readability index of ``textstat`` (its other grades
download a dictionary of syllables), length is counted in words. The three pairs of chat tastes want the
opposite of one number. Alone, whatever one side gains the other loses: win rates of the two would add up to
one, and no policy could please both, as the paper's does by its judge. People agree on something, though:
here both sides also want the answer to speak of what was asked (:func:`relevance`).

    python reproductions/smollm/tastes.py    # says what an answer is worth, as a check of the packages
"""

# ruff: noqa: SIM905 - a list of words reads better as one string
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import plain_text

__all__ = [
    "TASTES",
    "Tastes",
    "film",
    "grade",
    "judge_name",
    "length",
    "relevance",
    "require_packages",
    "sentiments",
    "tone",
]

#: about one standard deviation of each over samples of the reference, so that utilities have one scale
UNITS = {"sentiment": 0.35, "words": 7.0, "grade": 4.0, "relevance": 0.3}
#: grades beyond are those of what is no sentence
GRADES = (0.0, 20.0)
_IDLE = frozenset(
    (
        "what which when where would could should about that this with your from have does than then "
        "them they some tell give write explain name list make know like need want customer friends "
        "suggest advice word words each three work works happen happens follows imagine think lately "
        "always feel"
    ).split()
)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def word_counts(texts: Sequence[str]) -> np.ndarray:
    """Count words [N]; figures and punctuation are none."""
    return np.array([len(_words(text)) for text in texts], dtype=float)


@cache
def _analyzer() -> Any:
    require_packages()
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiments(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound [N], from -1 to 1; 0 for nothing."""
    return np.array([_analyzer().polarity_scores(text)["compound"] for text in texts], dtype=float)


def grades(texts: Sequence[str]) -> np.ndarray:
    """Reading grade [N] in school years, within :data:`GRADES`."""
    require_packages()
    import textstat

    return np.clip([textstat.automated_readability_index(text) for text in texts], *GRADES)


def relevance(prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Share [N] of a prompt's telling words (four letters and more) that the answer takes up.

    Example:
        >>> relevance(["Why do cats purr?"], ["Cats do it when they are content."]).tolist()
        [0.5]
    """
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        asked = {_stem(word) for word in _words(prompt) if len(word) > 3} - _IDLE
        said = {_stem(word) for word in _words(text)}
        found.append(len(asked & said) / len(asked) if asked else 0.0)
    return np.array(found)


def _stem(word: str) -> str:
    lower = word.lower()
    return lower if lower in _IDLE else lower.removesuffix("s")


def require_packages() -> None:
    """Raise :class:`UserError` where a scorer is not installed."""
    for package in ("textstat", "vaderSentiment"):
        if find_spec(package) is None:
            raise UserError(
                f"simulated users need the package {package}: pip install 'torchrl-maxmin[smollm]'"
            )


def _asked(prompts: Sequence[Text]) -> list[str]:
    """The last message, which is the question."""
    return [plain_text(text if isinstance(text, str) else text[-1:]) for text in prompts]


def film(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
    """Utilities [N, 2] of reviews: praise, and few words."""
    texts = [plain_text(text) for text in completions]
    return np.stack([sentiments(texts) / UNITS["sentiment"], -word_counts(texts) / UNITS["words"]], axis=-1)


def grade(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
    """Utilities [N, 2] of answers: a pupil's reading, and an expert's."""
    return _opposed(
        -grades([plain_text(text) for text in completions]) / UNITS["grade"], prompts, completions
    )


def length(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
    """Utilities [N, 2] of answers: few words, and many."""
    texts = [plain_text(text) for text in completions]
    return _opposed(-word_counts(texts) / UNITS["words"], prompts, completions)


def tone(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
    """Utilities [N, 2] of answers: friendly, and unfriendly."""
    texts = [plain_text(text) for text in completions]
    return _opposed(sentiments(texts) / UNITS["sentiment"], prompts, completions)


def _opposed(first: np.ndarray, prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
    shared = relevance(_asked(prompts), [plain_text(text) for text in completions]) / UNITS["relevance"]
    return np.stack([first, -first], axis=-1) + shared[:, None]


@dataclass(frozen=True)
class Tastes:
    """Two tastes.

    Attributes:
        names: of the majority's, and of the minority's.
        codes: the paper's names of the two.
        wants: what each wants, in words for a judge that reads.
        computed: what stands for it here.
        utilities: ``f(prompts, completions)``, [N, 2] in :data:`UNITS`.
    """

    names: tuple[str, str]
    codes: tuple[str, str]
    wants: tuple[str, str]
    computed: tuple[str, str]
    utilities: Callable[[Sequence[Text], Sequence[Text]], np.ndarray]


_RELEVANT = "words of the question taken up"
TASTES: dict[str, Tastes] = {
    "film": Tastes(
        ("positive", "concise"),
        ("", ""),
        ("praise of the film", "as few words as possible"),
        ("VADER's sentiment of what was added", "fewer words added"),
        film,
    ),
    "grade": Tastes(
        ("elementary", "expert"),
        ("P1A", "P1B"),
        ("an answer that an elementary school pupil understands", "an answer for experts with a doctorate"),
        (f"lower reading grade, {_RELEVANT}", f"higher reading grade, {_RELEVANT}"),
        grade,
    ),
    "length": Tastes(
        ("concise", "informative"),
        ("P2A", "P2B"),
        (
            "a concise answer without anything that could be left out",
            "an answer with as much detail as can be",
        ),
        (f"fewer words, {_RELEVANT}", f"more words, {_RELEVANT}"),
        length,
    ),
    "tone": Tastes(
        ("friendly", "unfriendly"),
        ("P3A", "P3B"),
        ("a friendly, witty and funny answer", "an answer in an unfriendly tone"),
        (f"VADER's sentiment, {_RELEVANT}", f"less of VADER's sentiment, {_RELEVANT}"),
        tone,
    ),
}


def judge_name(tastes: str) -> str:
    """What ``--judge`` calls a pair of tastes."""
    return f"tastes:{tastes}"


if __name__ == "__main__":
    asked, answer = "Why do cats purr?", "Cats purr when they are happy, and sometimes when they are hurt."
    for name, pair in TASTES.items():
        sys.stdout.write(f"{name}: {pair.names} {pair.utilities([asked], [answer])[0].round(2).tolist()}\n")
