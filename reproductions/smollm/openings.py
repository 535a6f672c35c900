"""Openings of film reviews, which a language model goes on with: seeded, in 40 sentence patterns and more.

No review of anybody's is copied: IMDb's data cannot be shipped, and an opening needs no opinion yet. Patterns
differ in who speaks, where the sentence breaks off and how much is known of the film, so that no place in the
sentence is always the one that varies.
"""

# ruff: noqa: SIM905 - a list of words reads better as one string
from __future__ import annotations

import random
import re

__all__ = ["film_openings"]

_SLOTS: dict[str, list[str]] = {
    "genre": (
        "thriller/western/comedy/romance/documentary/war film/musical/heist movie/ghost story/road movie/"
        "family drama/spy film/courtroom drama/sports film/crime film/fantasy/monster movie/biopic"
    ).split("/"),
    "place": (
        "a fishing village/Chicago/a boarding school/the Scottish Highlands/a submarine/a small "
        "desert town/postwar Rome/a hospital at night/the edge of the solar system/a travelling "
        "circus/Tokyo/an old hotel/a Norwegian island/the backstage of an opera house/a "
        "prison/suburban Ohio"
    ).split("/"),
    "lead": (
        "a retired detective/a lonely lighthouse keeper/a young violinist/a taxi driver/an ageing "
        "boxer/a night watchman/a widowed farmer/a schoolteacher/a failed magician/a bank robber/a "
        "translator/a chess prodigy/an undertaker/a runaway princess/a bored accountant/a nurse"
    ).split("/"),
    "goal": (
        "has one night to find a missing child/inherits a house that nobody wants/tries to win back an old "
        "friend/is mistaken for somebody famous/must cross a country in winter/falls in love with the wrong "
        "person/plans one last robbery/comes home after twenty years/discovers a letter in the attic/has to "
        "share a flat with an enemy/is asked to lie in court/learns to swim/hides a stranger in the barn"
    ).split("/"),
    "company": (
        "my brother/my parents/a friend from work/my daughter/nobody at all/my film club/my grandmother/"
        "a room full of students/my husband/two very tired children/my neighbour"
    ).split("/"),
    "when": (
        "last night/on a rainy Sunday/on a long flight/at a festival in May/for the third time this year/"
        "after years of putting it off/during the holidays/the week it opened/late at night/on an old tape"
    ).split("/"),
    "aspect": (
        "the camera work/the soundtrack/the dialogue/the pacing/the ending/the costume design/the "
        "lead performance/the script/the editing/the opening scene/the lighting/the supporting "
        "cast/the final hour/the humour"
    ).split("/"),
    "other": (
        "the story itself/the special effects/the romance/the villain/the narration/the middle section/"
        "the dubbing/the flashbacks/the love story/the chase in the last act/the score/the accents"
    ).split("/"),
    "year": "1938 1954 1961 1968 1973 1979 1984 1987 1993 1999 2004 2011 2016 2019".split(),
    "title": (
        "The Glass Harbour/Nine Winters/A Quiet Debt/Paper Lions/The Last Tram/Under the Salt/Marlow's Wife/"
        "Seven Miles Down/The Orchard Thief/Blue Signal/No Ordinary Tuesday/The Cartographer/Half a Kingdom/"
        "Letters to Nobody/The Ferryman's Son/Static/Cold Supper/An Honest Forgery/The Long Intermission"
    ).split("/"),
    "maker": (
        "director/writer/studio/composer/cinematographer/leading lady/comedian/team of animators"
    ).split("/"),
    "hope": (
        "something light/a proper scare/another routine sequel/the usual clichés/a good cry/very little/"
        "an old-fashioned adventure/a history lesson/more of the book/a masterpiece"
    ).split("/"),
    "number": "two three four ten".split(),
}

_PATTERNS = (
    "I watched this {genre} {when} with {company}, and",
    "I went into {title} expecting {hope}, and",
    "{title} is a {genre} set in {place}. It",
    "{aspect} of this {genre} is",
    "What struck me first about {title} was",
    "The story follows {lead}, who {goal}. The film",
    "When {lead} {goal}, the {genre}",
    "Few films of {year} are as",
    "If you only see one {genre} this year,",
    "My main problem with {title} is that {aspect}",
    "Let me begin with {aspect}, because",
    "There is a moment about {number} scenes in when {lead}",
    "Everybody told me that {title} was",
    "As {genre} films go, this one",
    "The {maker} of {title} has",
    "I saw {title} {when}. Honestly, I",
    "Set in {place}, this {genre} from {year}",
    "It is hard to talk about {title} without mentioning {aspect}, which",
    "{aspect} and {other} could not be more different:",
    "Having read the book, I thought that {title}",
    "The trailer promised {hope}. What we get is",
    "You have seen this plot before: {lead} {goal}. And yet",
    "For the first half hour, {title}",
    "By the time the credits rolled, {company_subject}",
    "I remember seeing {title} in {year}, and",
    "Not many people know this {genre} from {year}, but",
    "Somewhere in {place}, {lead} {goal}. That is all the plot there is, and",
    "I wanted to like {title}, but",
    "I did not expect to like a {genre} about {lead}, but",
    "Why does nobody talk about {title}? The",
    "A {genre} lives or dies by {aspect}, and here",
    "{number} minutes into {title} I",
    "This was the {maker}'s first {genre}, and",
    "Compared with the original from {year}, this remake",
    "Some call {title} a classic {genre}. To me it",
    "{lead} {goal} in {title}, a {genre} that",
    "The best thing about this {genre} is {aspect}; the worst is",
    "Rarely has {place} looked so",
    "Before the screening the {maker} said a few words. Afterwards",
    "Where do I start with {title}? {aspect}",
    "We rented {title} {when} because {company_subject} loves every {genre}. We",
    "If {lead} and {place} sound like an odd match, {title}",
    "Critics were divided over {title} in {year}. I",
    "It took me {number} attempts to finish {title}, since",
)

_SLOT = re.compile(r"\{(\w+)\}")


def _opening(pattern: str, rng: random.Random) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "company_subject":
            return rng.choice(["my brother", "my daughter", "my film club", "my neighbour"])
        return rng.choice(_SLOTS[name])

    text = _SLOT.sub(fill, pattern)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def film_openings(number: int, seed: int) -> list[str]:
    """Draw distinct openings, all patterns about as often.

    Args:
        number: how many, at most some thousands.
        seed: of the draw; the same gives the same openings.

    Example:
        >>> len(set(film_openings(300, seed=0)))
        300
    """
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < number:
        for pattern in rng.sample(_PATTERNS, len(_PATTERNS)):
            found.setdefault(_opening(pattern, rng))
    drawn = list(found)[:number]
    rng.shuffle(drawn)
    return drawn
