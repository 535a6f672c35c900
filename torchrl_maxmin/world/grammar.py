"""A small grammar of film reviews: about 200 words, 4 to 24 words a review.

Everything the embedded world says is drawn from here. A review has a mood; the mood
decides how often its clauses praise or complain. Nothing in this file knows of groups,
users or rewards.
"""

# ruff: noqa: SIM905 - a list of words reads better as one string
from __future__ import annotations

import random

POSITIVE = (
    "great wonderful brilliant lovely superb charming delightful moving clever funny gripping warm "
    "fresh elegant honest vivid tender bold bright touching joyful graceful"
).split()
NEGATIVE = (
    "awful boring terrible dull clumsy stale lazy noisy cold confusing bland tedious shallow messy "
    "hollow weak grim flat silly forced dreary tiresome"
).split()
POSITIVE_VERBS = "loved enjoyed admired adored liked praised treasured cherished".split()
NEGATIVE_VERBS = "hated disliked regretted endured loathed resented mocked despised".split()
NEUTRAL = (
    "long short quiet loud early late simple modern famous recent strange foreign small big local unusual"
).split()
NEUTRAL_VERBS = "watched saw noticed followed finished discussed recorded remembered found".split()
ASPECTS = (
    "film movie story plot acting cast script music ending opening pacing dialogue scenery lighting "
    "editing humour drama camera hero villain sequel premise costume dance song voice tone mood scene "
    "romance chase twist finale sound colour dream joke plan lesson letter"
).split()
PEOPLE = (
    "director writer actor actress singer editor producer critic stuntman narrator dancer composer".split()
)
COMPANIONS = "friend sister brother mother father neighbour teacher colleague uncle cousin".split()
PLACES = "home school work noon night dawn".split()
TIMES = "yesterday today tonight twice again once recently alone together".split()
ADVERBS = "really very quite truly rather simply so fairly deeply utterly almost somewhat".split()
FUNCTION = (
    "the a i we it was felt seemed looked and but while because with my at in its this that , .".split()
)

_OPINIONS = POSITIVE + NEGATIVE + POSITIVE_VERBS + NEGATIVE_VERBS + NEUTRAL + NEUTRAL_VERBS
_THINGS = ASPECTS + PEOPLE + COMPANIONS + PLACES + TIMES + ADVERBS
WORDS: tuple[str, ...] = tuple(dict.fromkeys(FUNCTION + _OPINIONS + _THINGS))

PRAISE = frozenset([*POSITIVE, *POSITIVE_VERBS])
COMPLAINT = frozenset([*NEGATIVE, *NEGATIVE_VERBS])

MIN_WORDS, MAX_WORDS = 4, 24
_MOODS = {"glad": 0.85, "mixed": 0.5, "cross": 0.15}  # chance that an opinion is praise


def _clause(rng: random.Random, praise: float) -> list[str]:
    adjectives, verbs = (POSITIVE, POSITIVE_VERBS) if rng.random() < praise else (NEGATIVE, NEGATIVE_VERBS)
    adverb = [rng.choice(ADVERBS)] if rng.random() < 0.4 else []
    kind = rng.random()
    if kind < 0.30:
        link = rng.choice(["was", "was", "felt", "seemed", "looked"])
        return ["the", rng.choice(ASPECTS), link, *adverb, rng.choice(adjectives)]
    if kind < 0.45:
        return [rng.choice(["i", "we"]), *adverb, rng.choice(verbs), "the", rng.choice([*ASPECTS, *PEOPLE])]
    if kind < 0.58:
        return ["a", *adverb, rng.choice(adjectives), rng.choice(ASPECTS)]
    if kind < 0.70:
        return ["it", rng.choice(["was", "felt", "seemed"]), *adverb, rng.choice(adjectives)]
    if kind < 0.80:
        return ["its", rng.choice(ASPECTS), "was", rng.choice(adjectives), "and", rng.choice(adjectives)]
    if kind < 0.90:
        place = ["at", rng.choice(PLACES)] if rng.random() < 0.5 else [rng.choice(TIMES)]
        return ["i", rng.choice(NEUTRAL_VERBS), rng.choice(["it", "this"]), *place]
    if kind < 0.95:
        return ["we", rng.choice(NEUTRAL_VERBS), "it", "with", "my", rng.choice(COMPANIONS)]
    return ["the", rng.choice(ASPECTS), "was", rng.choice(NEUTRAL)]


def sample_review(rng: random.Random) -> list[str]:
    """Draw one review.

    Args:
        rng: the source of randomness; the same state gives the same review.

    Returns:
        Between 4 and 24 words, punctuation counted as words, without special tokens.

    Example:
        >>> review = sample_review(random.Random(0))
        >>> 4 <= len(review) <= 24
        True
    """
    praise = _MOODS[rng.choice(list(_MOODS))]
    target = rng.randint(MIN_WORDS + 2, MAX_WORDS + 2)
    words = _clause(rng, praise)
    while len(words) < MIN_WORDS or len(words) < target - 3:
        joint = rng.choice([".", ".", ",", "and", "but", "while", "because"])
        longer = [*words, joint, *_clause(rng, praise)]
        if len(longer) > MAX_WORDS:
            break
        words = longer
    if len(words) < MAX_WORDS and rng.random() < 0.5:
        words.append(".")
    return words
