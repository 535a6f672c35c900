"""Time of an iteration with LoRA adapters: the package's ``ppo`` beside a loop by hand, and beside TRL.

    python benchmarks/adapters.py --model_name_or_path runs/smollm2
    python benchmarks/adapters.py --model_name_or_path runs/smollm2 --against plain --pairs 2

* ``plain``: MaxMin PPO of two groups with a critic, beside ``contestants/plain_ppo.py``, the same in PyTorch
  and peft.
* ``trl``: without a critic (``--advantage grpo``), beside TRL's ``GRPOTrainer``; TRL must be installed, in a
  folder of its own on PYTHONPATH for instance (``pip install --target FOLDER --no-deps 'trl==1.16.*'``).

Model, prompts, rewards, adapters, samples, epochs, minibatches, length and threads are the same. Each is a
process that lives through the run and iterates in turn, the order alternating; the first iteration of each is
not counted. A ratio is ours over the other's in one turn of both. Their median, by wall time, is to be at
most 1.00, or the exit status is 1; its interval is that of order statistics. Processor time stands beside.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import CONTESTANTS, child_environment, facts, median_interval, results_file, write, write_prompts

BAR = 1.0
PAIRS = {"plain": ("ours", "plain"), "trl": ("ours_grpo", "trl")}
CLOCKS = ("wall", "processor")


class Contestant:
    """A process of ``contestants/contestant.py``."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        (folder / name).mkdir()
        self.name, self.errors = name, (folder / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-B", CONTESTANTS / "contestant.py", name, json.dumps(settings), folder / name],
            env=child_environment(threads=settings["threads"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def iterate(self) -> dict[str, float]:
        """Let it do one iteration; returns seconds by clock.

        Raises:
            RuntimeError: with the end of its errors, where it fails.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith("iteration "):
                    return json.loads(line.removeprefix("iteration "))
        except BrokenPipeError:
            pass
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} ended: {self.errors.read()[-2000:]}")

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()
        self.errors.close()


def race(against: str, settings: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Let two contestants iterate in turn; returns seconds, ratios and their median."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {"dataset_name": f"{folder}/prompts.jsonl"}
        write_prompts(Path(settings["dataset_name"]))
        both = [Contestant(name, settings, Path(folder)) for name in PAIRS[against]]
        try:
            for contestant in both:
                contestant.iterate()  # checks, caches and first touches of memory
            times: dict[str, list[dict[str, float]]] = {contestant.name: [] for contestant in both}
            for pair in range(pairs):
                for contestant in both if pair % 2 == 0 else both[::-1]:
                    times[contestant.name].append(contestant.iterate())
                mine, other = (seconds[-1] for seconds in times.values())
                ratios = [mine[clock] / other[clock] for clock in CLOCKS]
                print(
                    f"{against} {pair + 1}: ours {mine['wall']:.1f} s, the other {other['wall']:.1f} s, "
                    f"ratio {ratios[0]:.3f} (processor {ratios[1]:.3f})",
                    flush=True,
                )
        finally:
            for contestant in both:
                contestant.close()
    ours, others = times.values()
    ratio = {
        clock: median_interval([a[clock] / b[clock] for a, b in zip(ours, others, strict=True)])
        for clock in CLOCKS
    }
    return {"seconds": times, "ratio": ratio, "bar": BAR, "holds": ratio["wall"]["median"] <= BAR}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--against", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rollout_batch_size", type=int, default=64)
    parser.add_argument("--mini_batch_size", type=int, default=16)
    parser.add_argument("--num_ppo_epochs", type=int, default=1)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--num_generations", type=int, default=4, help="responses a prompt, without a critic")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-6)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1, help="of each contestant")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/adapters.json")
    given = parser.parse_args()
    if "trl" in given.against and importlib.util.find_spec("trl") is None:
        parser.error(
            "--against trl needs trl: pip install --target FOLDER --no-deps 'trl==1.16.*', and FOLDER on "
            "PYTHONPATH; --against plain does without"
        )
    aside = ("against", "pairs", "output")
    settings = {name: value for name, value in vars(given).items() if name not in aside}
    settings["model_name_or_path"] = str(Path(given.model_name_or_path).resolve())
    output = given.output or results_file("adapters.json")
    result: dict[str, Any] = {
        "environment": facts("trl", threads=given.threads),
        "settings": settings | {"model_name_or_path": Path(given.model_name_or_path).name},
    }
    for against in given.against:
        result[against] = race(against, settings, given.pairs)
        write(output, result)
        for clock, found in result[against]["ratio"].items():
            print(
                f"{against}, {clock}: median ratio {found['median']:.3f} "
                f"[{found['low']:.3f}, {found['high']:.3f}], {found['confidence']:.0%} of {given.pairs} pairs"
            )
    return int(not all(result[against]["holds"] for against in given.against))


if __name__ == "__main__":
    sys.exit(main())
