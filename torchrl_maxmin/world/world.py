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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import import_transformers, load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.world.grammar import COMPLAINT, PRAISE, WORDS, sample_review

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

GROUPS = ("sentiment", "conciseness")
PRESETS = {
    # majority share, words at which praise saturates
    "10:1": (10 / 11, 8.0),
    "80:20": (0.8, 4.0),
}
RESPONSE_LENGTH = 24
_MAX_ROUNDS = 100  # of drawing pairs; a policy that varies at all needs a few
_TEST_SEED = 20_240_213  # one test set for all seeds, so that they can be compared
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
        moods = [sum(w in PRAISE for w in r) - sum(w in COMPLAINT for w in r) for r in words]
        mood, length = np.array(moods, dtype=float), np.array(list(map(len, words)), dtype=float)
        return np.stack([np.tanh(mood / self.sentiment_scale), -length / 10], axis=-1)

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
    drawn = ((sample_review(rng), rng.randint(2, 4)) for _ in range(num_reviews))
    return [(" ".join(review[:cut]), " ".join(review[cut:])) for review, cut in drawn]


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


# -- files -----------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(
    folder: Path, seed: int, num_texts: int = 16_000, num_prompts: int = 4_000, num_test_prompts: int = 512
) -> None:
    """Write what a run starts from.

    ``base_model`` (an untrained GPT-2 with its tokenizer), ``sft.jsonl`` (prompt and
    completion), ``prompts.jsonl`` and ``prompts_test.jsonl``. Test prompts are the same for
    every seed and occur in nothing that is trained on.
    """
    torch.manual_seed(seed)
    import_transformers().GPT2LMHeadModel(build_config()).save_pretrained(folder / "base_model")
    build_tokenizer().save_pretrained(folder / "base_model")
    texts = sample_reviews(num_texts, seed)
    write_rows(folder / "sft.jsonl", ({"prompt": p, "completion": c} for p, c in texts if not is_heldout(p)))
    known = sample_prompts(num_prompts, seed, heldout=False)
    test = sample_prompts(num_test_prompts, _TEST_SEED, heldout=True)
    for name, prompts in (("prompts", known), ("prompts_test", test)):
        write_rows(folder / f"{name}.jsonl", ({"prompt": prompt} for prompt in prompts))


def write_preferences(
    folder: Path,
    world: World,
    reference_path: str | Path,
    seed: int,
    num_users: int = 300,
    pairs_per_user: int = 20,
    test_pairs_per_user: int = 5,
    device: torch.device | str = "cpu",
) -> World:
    """Let people compare pairs of the reference policy's responses.

    Every user gets prompts of their own, two different responses each, and picks one by Bradley-Terry
    sampling of their group's utility. Written: ``preferences.jsonl`` and
    ``preferences_test.jsonl`` with prompt, chosen, rejected, user_id, and a group column for
    evaluation only; ``world.json`` with the utilities' standard deviations.

    Returns:
        The world, its ``utility_std`` measured on these responses.

    Raises:
        UserError: if the policy hardly ever gives two different responses to a prompt.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(reference_path))
    policy = TokenPolicy.from_pretrained(str(reference_path), tokenizer, max_new_tokens=RESPONSE_LENGTH)
    policy.to(device)
    generator = np.random.default_rng(seed)
    known = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    each = pairs_per_user + test_pairs_per_user
    groups = world.assign_users(num_users, seed)
    rows: list[dict[str, Any]] = []
    raw: list[np.ndarray] = []
    drawn: list[tuple[int, str, str, str]] = []
    with progress_bar("sampling pairs to compare", num_users * each) as advance:
        wanted = np.full(num_users, each)
        for _ in range(_MAX_ROUNDS):  # equal responses cannot be compared, empty ones not read: drawn again
            users = np.repeat(np.arange(num_users), wanted)
            prompts = [known[i] for i in generator.integers(len(known), size=len(users))]
            for start in range(0, len(users), 512):
                part = prompts[start : start + 512]
                responses = sample_responses(policy, encode_prompts(tokenizer, part), 2, 1024)
                _, texts = to_texts(tokenizer, responses)
                reviews = [f"{p} {c}" for p, c in zip(np.repeat(part, 2), texts, strict=True)]
                raw.append(world.raw_utilities(reviews))
                for i, prompt in enumerate(part):
                    first, second = texts[2 * i], texts[2 * i + 1]
                    if first != second and first.strip() and second.strip():
                        drawn.append((users[start + i], prompt, first, second))
                        wanted[users[start + i]] -= 1
                        advance()
            if not wanted.any():
                break
        else:
            raise UserError(
                f"{reference_path} answers most prompts with one response alone, so people have nothing to "
                "compare; train it less or with a smaller rate"
            )
    world.utility_std = tuple(np.concatenate(raw).std(0).tolist())
    world.save(folder / "world.json")
    drawn.sort(key=lambda row: row[0])
    owner = np.array([groups[row[0]] for row in drawn])
    sides = [f"{p} {a}" for _, p, a, _ in drawn], [f"{p} {b}" for _, p, _, b in drawn]
    prefers_first = world.label(*sides, owner, seed)
    columns = ("prompt", "chosen", "rejected", "user_id", "group")
    for (user, prompt, *texts), yes in zip(drawn, prefers_first, strict=True):
        group = world.group_names[groups[user]]
        ordered = texts if yes else reversed(texts)
        rows.append(dict(zip(columns, (prompt, *ordered, f"user-{user:03d}", group), strict=True)))
    known_rows = [row for i, row in enumerate(rows) if i % each < pairs_per_user]
    test_rows = [row for i, row in enumerate(rows) if i % each >= pairs_per_user]
    write_rows(folder / "preferences.jsonl", known_rows)
    write_rows(folder / "preferences_test.jsonl", test_rows)
    return world
