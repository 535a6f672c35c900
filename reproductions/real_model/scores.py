"""What two verbs and a third reader say of the same completions, side by side.

The third reader is ``transformers`` alone: the reward folder as a sequence classifier, asked about one row
at a time, without padding. Its rows are made here by the tokenizer's chat template. It reads in float64, and
again in float32: what lies between the two is rounding, and what the verbs differ by beyond it is another
reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.models.loading import import_transformers

__all__ = ["READERS", "Comparison", "RecordedRewards", "classifier_scores", "write_scores"]

#: who scores, and what the others are compared with
READERS = ("ppo", "evaluate", "transformers", "transformers_float32")


class RecordedRewards:
    """Scores responses as the given rewards do, and keeps both.

    Args:
        rewards: maps responses to scores [B, K], with a ``num_groups``.
    """

    def __init__(self, rewards: Any):
        self.rewards, self.num_groups = rewards, rewards.num_groups
        self._responses: list[TensorDictBase] = []
        self._scores: list[Tensor] = []

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Return the scores [B, K] of responses."""
        scores = self.rewards(responses)
        self._responses.append(responses.detach().cpu().clone())
        self._scores.append(scores.detach().cpu().clone())
        return scores

    def record(self) -> tuple[TensorDict, Tensor]:
        """Return all responses [N] and their scores [N, K] so far."""
        return torch.cat(self._responses), torch.cat(self._scores)


@torch.no_grad()
def classifier_scores(
    folder: Path | str,
    conversations: Sequence[list[dict[str, str]]],
    responses: TensorDictBase,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Score responses by a reward folder with ``transformers`` alone.

    Args:
        folder: what the reward stage wrote.
        conversations: the prompts that ``prompt_index`` counts.
        responses: ``prompt_index`` [N], ``action`` int64 and ``action_mask`` bool [N, R].
        dtype: what the model computes in.

    Returns:
        Raw scores [N, K] of that dtype.
    """
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    classifier = transformers.AutoModelForSequenceClassification
    model = classifier.from_pretrained(folder, dtype=dtype).eval()
    scores = []
    for row in responses.unbind(0):
        conversation = conversations[int(row["prompt_index"])]
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        ids = [*prompt["input_ids"], *row["action"][row["action_mask"]].tolist()]
        scores.append(model(input_ids=torch.tensor([ids])).logits[0])
    return torch.stack(scores)


@dataclass
class Comparison:
    """Scores of completions by :data:`READERS`.

    Args:
        of: where the completions come from.
        tokens: length of each completion, [N].
        ended: whether each ends with EOS, [N].
        scores: reader -> calibrated scores [N, K], of every one of :data:`READERS`.
    """

    of: str
    tokens: Tensor
    ended: Tensor
    scores: dict[str, Tensor] = field(repr=False)

    @classmethod
    def make(cls, of: str, responses: TensorDictBase, eos_token_id: int, **scores: Tensor) -> Comparison:
        """Return the comparison of responses as a policy writes them."""
        mask = responses["action_mask"]
        ended = ((responses["action"] == eos_token_id) & mask).any(-1)
        return cls(of, mask.sum(-1), ended, scores)

    def difference(self, one: str, other: str) -> float:
        """Return the largest absolute difference of two readers over completions and groups."""
        return (self.scores[one].double() - self.scores[other].double()).abs().max().item()

    @property
    def rounding(self) -> float:
        """The largest difference that float32 alone makes to one reading."""
        return self.difference("transformers", "transformers_float32")

    def alike(self, bar: float) -> bool:
        """Whether ppo and evaluate differ by at most a bar, or what two float32 runs of one reading may."""
        return self.difference("ppo", "evaluate") <= max(bar, 2 * self.rounding)

    def summary(self) -> dict[str, Any]:
        """Return the counts and the largest differences."""
        return {
            "completions": len(self.tokens),
            "ended": int(self.ended.sum()),
            "spread": [float(deviation) for deviation in self.scores["ppo"].double().std(0)],
            "ppo and evaluate": self.difference("ppo", "evaluate"),
            "ppo and transformers": self.difference("ppo", "transformers"),
            "evaluate and transformers": self.difference("evaluate", "transformers"),
            "float32 and float64": self.rounding,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a completion and group."""
        return [
            {"of": self.of, "completion": i, "tokens": int(self.tokens[i]), "ended": bool(self.ended[i])}
            | {"group": k, **{reader: f"{self.scores[reader][i, k].item():.7f}" for reader in READERS}}
            for i in range(len(self.tokens))
            for k in range(self.scores["ppo"].shape[-1])
        ]


def write_scores(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write every score of some comparisons."""
    rows = [row for comparison in comparisons for row in comparison.rows()]
    write_csv(path, rows)
