"""Instructions for a chat model, over daily life, science, work, language, history and play: seeded.

Each of 16 kinds has subjects of its own, so that a question and its subject belong together. None is taken
from Koala, Alpaca or any other set.
"""

from __future__ import annotations

import random

__all__ = ["instructions"]

#: what is asked, and about what; both vary
_KINDS: tuple[tuple[str, str], ...] = (
    (
        "Why is it that {}?/Can you tell me why {}?/My son asks why {}. What should I say?",
        "the sky is blue|ice floats on water|cats purr|we dream|leaves change colour in autumn|the sea is "
        "salty|metal feels colder than wood|stars twinkle|bread rises|we have leap years|onions make us "
        "cry|planes can fly upside down",
    ),
    (
        "Explain {}./What is {}?/In your own words, what is {}?",
        "photosynthesis|inflation|a black hole|a vaccine|the water cycle|a mortgage|gravity|machine "
        "learning|a parliament|evolution|compound interest|a prime number|the ozone layer|an algorithm",
    ),
    (
        "How do I {}?/What is the easiest way to {}?/Give me step by step advice on how to {}.",
        "boil an egg|change a bicycle tyre|repot a plant|remove a coffee stain|learn to juggle|tie a tie|"
        "make soup from leftovers|clean a keyboard|fold a fitted sheet|sharpen a kitchen knife|start a "
        "vegetable garden|light a camp fire",
    ),
    (
        "Give me tips for {}./What should I know before {}?",
        "a job interview|moving to another city|a first marathon|public speaking|a long train journey|buying "
        "a used car|adopting a dog|sharing a flat|a camping trip in the rain|learning the piano as an adult",
    ),
    (
        "Write {}./Could you write {}?",
        "a short poem about rain|a thank-you note to a teacher|an apology to a neighbour for the noise|a "
        "birthday message for a colleague|an advertisement for a bakery|the first lines of a mystery|a "
        "limerick about a goat|a farewell to a good friend|a notice about a lost cat",
    ),
    (
        "What is the difference between {}?/I always mix up {}. How do they differ?",
        "weather and climate|a virus and a bacterium|a crocodile and an alligator|jam and marmalade|speed "
        "and velocity|a city and a town|debit and credit cards|a simile and a metaphor|frogs and toads",
    ),
    (
        "I feel {}. What can I do?/Lately I am {}. Any advice?",
        "tired after lunch|nervous before exams|lonely in a new town|bored at work|stuck with my novel|angry "
        "with my sister|overwhelmed by email|unable to fall asleep",
    ),
    (
        "Tell me about {}./What made {} so important?",
        "Marie Curie|the printing press|the Silk Road|Ada Lovelace|the Roman roads|the first moon "
        "landing|the Great Wall of China|Leonardo da Vinci|the steam engine|the city of Venice",
    ),
    (
        "Recommend {}./I am looking for {}. What do you suggest?",
        "a book for a rainy weekend|a quick vegetarian dinner|a board game for two|a hobby without a "
        "screen|a gift for a grandfather|a city to visit in spring|a podcast about science|music for "
        "concentrating",
    ),
    (
        "Is it {}?/Some say that it is not {}. Is that so?",
        "healthy to skip breakfast|safe to swim after eating|worth learning Latin today|rude to call without "
        "warning|possible to learn to sing|better to rent than to buy|useful to keep a diary",
    ),
    (
        "Summarise {} for me./What happens in {}?",
        "Romeo and Juliet|the story of the Trojan horse|Moby Dick|the tale of the tortoise and the hare|"
        "Frankenstein|the myth of Icarus|Cinderella",
    ),
    (
        "How would you {}?/A customer wants me to {}. What do I answer?",
        "explain a late delivery|refund a broken lamp|describe our new tea|cancel an order "
        "politely|repair an old radio|pack twelve wine glasses",
    ),
    (
        "What would happen if {}?/Imagine that {}. What follows?",
        "the moon vanished|nobody slept any more|all cars were electric|insects died out|money were "
        "abolished|the day had thirty hours",
    ),
    (
        "List three {}./Name some {} and say a word about each.",
        "rivers in Africa|renewable sources of energy|animals that sleep in winter|uses of "
        "vinegar|inventions of the twentieth century|kinds of clouds|exercises for a stiff back",
    ),
    (
        "How does {} work?/I would like to understand how {} works.",
        "a fridge|a bicycle lock|the stock market|a compass|a microphone|a lottery|an election|a solar panel|"
        "a pressure cooker|a search engine",
    ),
    (
        "Should I {}?/My friends say that I should {}. What do you think?",
        "quit a job that bores me|learn a third language|lend money to a cousin|cut my own hair|travel alone|"
        "get up at five|buy a piano|forgive an old friend",
    ),
)  # fmt: skip


def instructions(number: int, seed: int, *, heldout: bool = False) -> list[str]:
    """Draw distinct instructions, all kinds about as often and every subject once before any comes twice.

    A quarter of every kind's subjects, the same for all seeds, is kept for ``heldout``.

    Args:
        number: how many, at most about 240, and 70 held out.
        seed: of the draw; the same gives the same instructions.
        heldout: draw of the subjects that training never sees.

    Raises:
        ValueError: for more than there are.

    Example:
        >>> set(instructions(200, seed=0)) & set(instructions(60, seed=0, heldout=True))
        set()
    """
    rng = random.Random(seed)
    queues = []
    for wordings, subjects in _KINDS:
        asked = wordings.split("/")
        about = [text for i, text in enumerate(subjects.split("|")) if (i % 4 == 3) == heldout]
        rng.shuffle(about)
        start, rounds = rng.randrange(len(asked)), range(len(asked))
        queues.append(
            [asked[(start + turn + i) % len(asked)].format(s) for turn in rounds for i, s in enumerate(about)]
        )
    if number > sum(map(len, queues)):
        raise ValueError(f"there are {sum(map(len, queues))} such instructions, not {number}")
    drawn: list[str] = []
    while len(drawn) < number:
        ready = [queue for queue in queues if queue]
        rng.shuffle(ready)
        drawn += [queue.pop(0) for queue in ready]
    return drawn[:number]
