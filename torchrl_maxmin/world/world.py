"""The embedded world: two tastes in film reviews, and people who label pairs by them.

The conflict is *chosen*: one group wants praise, the other wants few words, and in this
grammar more praise costs words. The world exists so that a whole run, from preferences to
results by group, has a ground truth to be held against. Group labels live in a column that
training never reads.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.world.grammar import COMPLAINT, PRAISE, WORDS, sample_review

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

GROUPS = ("sentiment", "conciseness")
PRESETS = {
    # majority share, words at which praise saturates
    "10:1": (10 / 11, 8.0),
    "80:20": (0.8, 4.0),
}
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


@dataclass
class World:
    """Utilities of the two groups of the embedded world, and the noise of their labels.

    Utilities of a whole review (prompt and response, punctuation counts as a word):

    * ``sentiment``: ``tanh((praise - complaint) / sentiment_scale)``
    * ``conciseness``: ``-words / 10``

    each divided by its standard deviation over samples of the reference policy
    (``utility_std``), so that one unit is one standard deviation. A user prefers ``a`` to
    ``b`` with probability ``sigmoid(tau * (u(a) - u(b)))`` (Bradley-Terry).

    Args:
        name: ``"10:1"`` or ``"80:20"``, for :meth:`preset`.
        shares: population share of each group, largest first.
        sentiment_scale: words of praise at which sentiment saturates.
        tau: inverse noise of the labels.
        utility_std: one standard deviation of each raw utility under the reference policy.

    Example:
        >>> world = World.preset("10:1")
        >>> world.utilities(["the film was great", "a dull film"]).shape
        (2, 2)
    """

    name: str
    shares: tuple[float, ...]
    sentiment_scale: float
    tau: float = 3.0
    utility_std: tuple[float, ...] = (1.0, 1.0)
    group_names: tuple[str, ...] = field(default=GROUPS)

    @classmethod
    def preset(cls, name: str) -> World:
        """Return a world by name; raises :class:`UserError` for an unknown one."""
        if name not in PRESETS:
            raise UserError(f"unknown world {name!r}; choose one of {', '.join(PRESETS)}")
        share, scale = PRESETS[name]
        return cls(name=name, shares=(share, 1 - share), sentiment_scale=scale)

    def save(self, path: str | Path) -> None:
        """Write the world as json."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> World:
        """Read a world that :meth:`save` wrote; raises :class:`UserError` for anything else."""
        try:
            raw: dict[str, Any] = json.loads(Path(path).read_text())
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            return cls(**settings)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no world; give a world.json that the demo wrote") from error

    def raw_utilities(self, reviews: Sequence[str]) -> np.ndarray:
        """Utilities [N, 2] of whole reviews, before division by ``utility_std``."""
        words = [review.split() for review in reviews]
        mood = np.array(
            [sum(w in PRAISE for w in r) - sum(w in COMPLAINT for w in r) for r in words], dtype=float
        )
        length = np.array([len(r) for r in words], dtype=float)
        return np.stack([np.tanh(mood / self.sentiment_scale), -length / 10], axis=-1).reshape(
            -1, len(GROUPS)
        )

    def utilities(self, reviews: Sequence[str]) -> np.ndarray:
        """Utilities [N, 2] of whole reviews in standard deviations of the reference policy."""
        return self.raw_utilities(reviews) / np.asarray(self.utility_std)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Utilities [N, 2] of completions; the form a judge or a reward function has."""
        if not all(isinstance(text, str) for text in (*prompts, *completions)):
            raise UserError("the embedded world reads plain text, and these prompts are conversations")
        return self.utilities([f"{p} {c}" for p, c in zip(prompts, completions, strict=True)])

    def assign_users(self, num_users: int, seed: int) -> np.ndarray:
        """Group index [num_users] of every user; shares exact up to rounding, order shuffled."""
        minority = max(1, round(num_users * self.shares[1]))
        groups = np.zeros(num_users, dtype=np.int64)
        groups[:minority] = 1
        return np.random.default_rng(seed).permutation(groups)

    def label(self, first: Sequence[str], second: Sequence[str], groups: np.ndarray, seed: int) -> np.ndarray:
        """Whether the user of each row prefers ``first`` [N] (bool), by Bradley-Terry sampling."""
        rows = np.arange(len(groups))
        margin = (self.utilities(first) - self.utilities(second))[rows, groups]
        chance = 1 / (1 + np.exp(-self.tau * margin))
        return np.random.default_rng(seed).random(len(groups)) < chance


def is_heldout(prompt: str) -> bool:
    """Whether a prompt belongs to the fifth of all prompts that only evaluation may use."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def sample_reviews(num_reviews: int, seed: int) -> list[tuple[str, str]]:
    """Draw reviews cut into a prompt (the first 2 to 4 words) and the rest.

    Args:
        num_reviews: how many.
        seed: the same seed gives the same reviews.

    Returns:
        ``(prompt, completion)`` strings; the completion may be empty for a 4-word review.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(num_reviews):
        review = sample_review(rng)
        cut = rng.randint(2, 4)
        rows.append((" ".join(review[:cut]), " ".join(review[cut:])))
    return rows


def sample_prompts(num_prompts: int, seed: int, heldout: bool) -> list[str]:
    """Draw distinct prompts from one side of the split (:func:`is_heldout`)."""
    prompts: dict[str, None] = {}
    batch = 0
    while len(prompts) < num_prompts:
        for prompt, _ in sample_reviews(4 * num_prompts, seed=seed * 1000 + batch):
            if is_heldout(prompt) == heldout:
                prompts.setdefault(prompt)
        batch += 1
    return list(prompts)[:num_prompts]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer: one token a word, ``<bos>`` before every text, ``<pad>`` never ``<eos>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate([PAD, BOS, EOS, UNK, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config() -> GPT2Config:
    """A GPT-2 of about 115 thousand parameters, without dropout, for the world's tokenizer."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(WORDS) + 4,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
