"""Record what one seed's policies got on held-out prompts: utilities or wins, KL and length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_maxmin.core.json_text import complete, write_json_text
from torchrl_maxmin.stats.rates import win_matrix

__all__ = ["REFERENCE", "SeedResult"]

#: The policy that every other one is compared with.
REFERENCE = "sft"

_ARRAYS_FILE = "arrays.npz"
_JSON_FILE = "result.json"
_FIELDS = ("utilities", "kl", "length", "wins")


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """Every policy of one seed, measured on the held-out prompts.

    All seeds of an experiment share the same held-out prompts in the same order: the intervals
    resample prompts jointly over seeds.

    Attributes:
        seed: The seed that trained these policies.
        group_names: The G groups, in the order of the utilities' last dimension.
        group_shares: Population shares [G]; the largest is the majority, and people are weighed by them.
        utilities: Policy name -> utilities [N prompts, M samples, G groups]. ``sft`` is always there;
            M may differ between policies, N and G may not. Empty where judges compared pairs.
        kl: Policy name -> [N, M], the sequence's log pi - log pi_ref on the policy's own samples.
        length: Policy name -> [N, M], response length in tokens.
        wins: Where judges compared pairs, in place of utilities: policy name -> probability [N, P, G] that
            its response is the better one, against each of the P policies in their order here.
        shares_are: ``true`` shares of a known population, ``found`` by clustering, ``equal`` for want of
            any, or just ``given``.
        extra: Plain JSON that is carried through: ``em``, ``certificate``, ``calibration``,
            ``group_users`` (users in each group), ``timings``, ... (see :func:`summarise`).

    Raises:
        ValueError: If ``sft`` is missing, utilities and wins are both there or both not, shapes disagree, or
            a number is not finite.

    Example:
        >>> import numpy as np
        >>> result = SeedResult(
        ...     seed=0, group_names=["long", "short"], group_shares=[0.9, 0.1],
        ...     utilities={"sft": np.zeros((4, 2, 2)), "maxmin": np.ones((4, 2, 2))},
        ... )
        >>> result.num_prompts
        4
    """

    seed: int
    group_names: list[str]
    group_shares: list[float]
    utilities: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kl: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    length: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    wins: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shares_are: str = "given"

    def __post_init__(self) -> None:
        for name in _FIELDS:
            arrays = {policy: np.asarray(array) for policy, array in getattr(self, name).items()}
            object.__setattr__(self, name, arrays)
        if self.utilities and self.wins:
            raise ValueError(f"seed {self.seed}: utilities and wins; give one of the two")
        what = "wins" if self.wins else "utilities"
        if REFERENCE not in self.policies:
            raise ValueError(
                f"seed {self.seed}: no {what} for '{REFERENCE}', the policy that the others are compared "
                f"with; got {sorted(self.policies)}. Evaluate it too."
            )
        num_groups = len(self.group_names)
        if len(self.group_shares) != num_groups:
            raise ValueError(f"seed {self.seed}: {num_groups} group names, {len(self.group_shares)} shares")
        if len(set(self.group_names)) != num_groups:
            raise ValueError(f"seed {self.seed}: group names repeat: {self.group_names}")
        second = f"P={len(self.policies)} policies" if self.wins else "M samples"
        for policy, array in self._scores.items():
            right = array.ndim == 3 and array.shape[::2] == (self.num_prompts, num_groups)
            if not right or (self.wins and array.shape[1] != len(self.policies)):
                raise ValueError(
                    f"seed {self.seed}: {what} of '{policy}' must be [N={self.num_prompts} prompts, "
                    f"{second}, G={num_groups} groups], got {list(array.shape)}"
                )
        for name in ("kl", "length"):
            for policy, array in getattr(self, name).items():
                if policy not in self.policies:
                    raise ValueError(f"seed {self.seed}: {name} of '{policy}', which has no {what}")
                samples = array.shape[1:] if self.wins else self.utilities[policy].shape[1:2]
                if array.ndim != 2 or array.shape != (self.num_prompts, *samples):
                    raise ValueError(
                        f"seed {self.seed}: {name} of '{policy}' must be [N, M] = "
                        f"{[self.num_prompts, *samples]}, got {list(array.shape)}"
                    )
        for place, array in self._arrays().items():
            if not np.isfinite(array).all():
                name, policy = place.split("/", 1)
                raise ValueError(
                    f"seed {self.seed}: {name} of '{policy}' holds NaN or infinity; a comparison would "
                    "count it as a loss. Drop or repair those samples first."
                )

    @property
    def num_prompts(self) -> int:
        """Number of held-out prompts N."""
        return self._scores[REFERENCE].shape[0]

    @property
    def policies(self) -> list[str]:
        """Policy names, in the order given."""
        return list(self._scores)

    @property
    def _scores(self) -> dict[str, np.ndarray]:
        return self.wins or self.utilities

    def _arrays(self) -> dict[str, Any]:
        return {
            f"{name}/{policy}": array for name in _FIELDS for policy, array in getattr(self, name).items()
        }

    def win_matrix(self, policy: str, other: str) -> np.ndarray:
        """Compute how often each group prefers one policy to another, prompt by prompt: [N, G]."""
        if self.wins:
            return self.wins[policy][:, self.policies.index(other)]
        return win_matrix(self.utilities[policy], self.utilities[other])

    def save(self, folder: str | Path) -> Path:
        """Write ``arrays.npz`` and ``result.json`` into ``folder`` (made if missing) and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / _ARRAYS_FILE, **self._arrays())
        record = {
            "seed": int(self.seed),
            "group_names": list(self.group_names),
            "group_shares": [float(share) for share in self.group_shares],
            "shares_are": self.shares_are,
            "policies": self.policies,
            "extra": self.extra,
        }
        write_json_text(folder / _JSON_FILE, record)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SeedResult:
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If ``folder`` holds no saved result.
            UserError: If its record is damaged.
        """
        folder = Path(folder)
        for name in (_ARRAYS_FILE, _JSON_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no saved result: {name} is missing")
        with complete(folder / _JSON_FILE):
            record = json.loads((folder / _JSON_FILE).read_text(encoding="utf-8"))
            policies = record.pop("policies")
        with np.load(folder / _ARRAYS_FILE, allow_pickle=False) as archive:
            for name in _FIELDS:
                there = [policy for policy in policies if f"{name}/{policy}" in archive]
                record[name] = {policy: archive[f"{name}/{policy}"] for policy in there}
        return cls(**record)
