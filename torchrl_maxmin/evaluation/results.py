"""What one trained seed leaves behind for evaluation: utilities, KL and length on held-out prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["REFERENCE", "SeedResult"]

#: The policy that every other one is compared with.
REFERENCE = "sft"

_ARRAYS_FILE = "arrays.npz"
_JSON_FILE = "result.json"


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """Every policy of one seed, measured on the held-out prompts.

    All seeds of an experiment share the same held-out prompts in the same order: the intervals
    resample prompts jointly over seeds.

    Attributes:
        seed: The seed that trained these policies.
        group_names: The G groups, in the order of the utilities' last dimension.
        group_shares: Population shares [G]; the largest is the majority.
        utilities: Policy name -> utilities [N prompts, M samples, G groups]. ``sft`` is always there;
            M may differ between policies, N and G may not.
        kl: Policy name -> [N, M], the sequence's log pi - log pi_ref on the policy's own samples.
        length: Policy name -> [N, M], response length in tokens.
        extra: Plain JSON that is carried through: ``em``, ``certificate``, ``calibration``,
            ``group_users`` (users in each group), ``timings``, ... (see :func:`summarise`).

    Raises:
        ValueError: If ``sft`` is missing, or shapes disagree, or a number is not finite.

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
    utilities: dict[str, np.ndarray]
    kl: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    length: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("utilities", "kl", "length"):
            arrays = {policy: np.asarray(array) for policy, array in getattr(self, name).items()}
            object.__setattr__(self, name, arrays)
        if REFERENCE not in self.utilities:
            raise ValueError(
                f"seed {self.seed}: no utilities for '{REFERENCE}', the policy that the others are compared "
                f"with; got {sorted(self.utilities)}. Evaluate it too."
            )
        num_groups = len(self.group_names)
        if len(self.group_shares) != num_groups:
            raise ValueError(f"seed {self.seed}: {num_groups} group names, {len(self.group_shares)} shares")
        if len(set(self.group_names)) != num_groups:
            raise ValueError(f"seed {self.seed}: group names repeat: {self.group_names}")
        num_prompts = self.utilities[REFERENCE].shape[0]
        for policy, array in self.utilities.items():
            if array.ndim != 3 or array.shape[0] != num_prompts or array.shape[2] != num_groups:
                raise ValueError(
                    f"seed {self.seed}: utilities of '{policy}' must be [N={num_prompts} prompts, M samples, "
                    f"G={num_groups} groups], got {list(array.shape)}"
                )
        for name in ("kl", "length"):
            for policy, array in getattr(self, name).items():
                if policy not in self.utilities:
                    raise ValueError(f"seed {self.seed}: {name} of '{policy}', which has no utilities")
                if array.shape != self.utilities[policy].shape[:2]:
                    raise ValueError(
                        f"seed {self.seed}: {name} of '{policy}' must be [N, M] = "
                        f"{list(self.utilities[policy].shape[:2])}, got {list(array.shape)}"
                    )
        for name in ("utilities", "kl", "length"):
            for policy, array in getattr(self, name).items():
                if not np.isfinite(array).all():
                    raise ValueError(
                        f"seed {self.seed}: {name} of '{policy}' holds NaN or infinity; a comparison would "
                        "count it as a loss. Drop or repair those samples first."
                    )

    @property
    def num_prompts(self) -> int:
        """Number of held-out prompts N."""
        return self.utilities[REFERENCE].shape[0]

    @property
    def policies(self) -> list[str]:
        """Policy names, in the order given."""
        return list(self.utilities)

    def save(self, folder: str | Path) -> Path:
        """Write ``arrays.npz`` and ``result.json`` into ``folder`` (made if missing) and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{name}/{policy}": array
            for name in ("utilities", "kl", "length")
            for policy, array in getattr(self, name).items()
        }
        with open(folder / _ARRAYS_FILE, "wb") as file:
            np.savez_compressed(file, **arrays)
        record = {
            "seed": int(self.seed),
            "group_names": list(self.group_names),
            "group_shares": [float(share) for share in self.group_shares],
            "policies": self.policies,
            "extra": self.extra,
        }
        (folder / _JSON_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SeedResult:
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If ``folder`` holds no saved result.
        """
        folder = Path(folder)
        for name in (_ARRAYS_FILE, _JSON_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no saved result: {name} is missing")
        record = json.loads((folder / _JSON_FILE).read_text(encoding="utf-8"))
        fields: dict[str, dict[str, np.ndarray]] = {"utilities": {}, "kl": {}, "length": {}}
        with np.load(folder / _ARRAYS_FILE, allow_pickle=False) as archive:
            for policy in record["policies"]:
                for name, arrays in fields.items():
                    if f"{name}/{policy}" in archive:
                        arrays[policy] = archive[f"{name}/{policy}"]
        return cls(
            seed=record["seed"],
            group_names=record["group_names"],
            group_shares=record["group_shares"],
            extra=record["extra"],
            **fields,
        )
