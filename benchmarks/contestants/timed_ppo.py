"""A run of PPO that says how long its iterations took; called with settings as JSON, and where to write.

Seconds are those of the clock and of this process, by phase: sampling, optimizer steps, and the rest, which
is what scores a rollout.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchrl_maxmin.core import run
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig

CLOCKS = (time.perf_counter, time.process_time)
spent: dict[str, list[float]] = {}
ends: list[dict[str, list[float]]] = []


def timed(kind: type, method: str, phase: str) -> None:
    """Add up the seconds of a method's calls."""
    function = getattr(kind, method)

    def call(*arguments: Any, **options: Any) -> Any:
        before = [clock() for clock in CLOCKS]
        found = function(*arguments, **options)
        total = spent.setdefault(phase, [0.0] * len(CLOCKS))
        spent[phase] = [t + clock() - b for t, clock, b in zip(total, CLOCKS, before, strict=True)]
        return found

    setattr(kind, method, call)


def main() -> None:
    timed(TokenPolicy, "forward", "generate")
    timed(Learner, "update", "update")
    write = run.MetricsLog.write

    def watched(*arguments: Any) -> None:
        write(*arguments)
        ends.append({"all": [clock() for clock in CLOCKS], **spent})

    run.MetricsLog.write = watched  # type: ignore[method-assign]
    run_ppo(PPOConfig(**json.loads(sys.argv[1])))
    if os.environ.get("RANK", "0") == "0":  # the group that knew its ranks is gone by now
        rows = []
        for before, after in pairwise(ends):
            took = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
            took["score"] = [
                whole - generate - update
                for whole, generate, update in zip(took["all"], took["generate"], took["update"], strict=True)
            ]
            rows.append({name: {"wall": x[0], "processor": x[1]} for name, x in took.items()})
        Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
