"""The peak memory that `torchrl-maxmin plan` foretells, beside what a run of the same settings takes.

    python benchmarks/plan.py --model_name_or_path runs/smollm2                 # every setting, minutes each
    python benchmarks/plan.py --model_name_or_path runs/smollm2 --only full lora

Every setting is one iteration of PPO in a process of its own, whose peak is the operating system's (resident
set, libraries included), and a plan from the config alone. An absolute difference above 15% is exit status 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BAR = 0.15
GROUPS = 2
ROOT = Path(__file__).resolve().parents[1]
LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": ["all-linear"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, K=8": {"groups": 8},
    "full, micro-batches of 4": {"per_device_train_batch_size": 4},
    "full, no critic": {"advantage": "rloo", "num_generations": 4},
    "lora": LORA,
    "lora, heads": {**LORA, "critic": "heads"},
    "lora, no critic": {**LORA, "advantage": "rloo", "num_generations": 4},
    "lora, checkpointing": {**LORA, "gradient_checkpointing": True},
    "lora, bfloat16": {**LORA, "dtype": "bfloat16"},
}
#: flags of the run that a plan does not read
RUN_ONLY = ("num_generations",)


def short(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward of brevity."""
    return [-float(len(text)) for text in completions]


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward of vowels."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def write_prompts(path: Path, model: str) -> int:
    """Write 64 prompts; returns the tokens of the longest."""
    from transformers import AutoTokenizer

    topics = ["the sea", "my old house", "a long film", "winter", "the new school", "bread", "a quiet town"]
    texts = [
        f"Review {i}: I thought about {topics[i % 7]} and {topics[(3 * i + 2) % 7]}, and" for i in range(64)
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(model)
    return max(len(tokenizer(text).input_ids) for text in texts)


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    found: list[str] = []
    for name, value in flags.items():
        found += (
            [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value).lower()]
        )
    return found


def run(arguments: list[str], root: Path) -> float:
    """Run a verb in a process of its own; returns its peak in bytes."""
    paths = os.pathsep.join(map(str, (root / "kernels", root, Path(__file__).parent)))
    quiet = {"TORCHRL_MAXMIN_QUIET": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-B", "-m", "torchrl_maxmin", *arguments]
    environment = os.environ | quiet | {"PYTHONPATH": paths}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root, text=True
    ) as child:
        output = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(output[-2000:])
    return usage.ru_maxrss * 1024.0


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Plan one setting and run it."""
    settings = dict(SETTINGS[name])
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        common = {
            "model_name_or_path": str(Path(given.model_name_or_path).resolve()),
            "reward_funcs": ["plan:short", "plan:vowels"] * (settings.pop("groups", GROUPS) // 2),
            "max_prompt_length": write_prompts(prompts, given.model_name_or_path),
            "rollout_batch_size": given.rollout_batch_size,
            "response_length": 32,
            "mini_batch_size": 16,
            "num_ppo_epochs": 1,
            "calibration_prompts": given.calibration_prompts,
            "device": "cpu",
        }
        only = {key: settings.pop(key) for key in RUN_ONLY if key in settings}
        flags = words(common | settings)
        groups = ["--num_groups", str(len(common["reward_funcs"]))]
        run(["plan", *flags, *groups, "--output_dir", f"{folder}/plan"], ROOT)
        plan = json.loads(Path(f"{folder}/plan/summary.json").read_text())
        rest = {"dataset_name": str(prompts), "output_dir": f"{folder}/run", "num_iterations": 1}
        measured = run(["ppo", *flags, *words(only | rest)], given.checkout.resolve())
    planned = plan["peak"]["bytes"]
    return {
        "setting": name,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "difference": planned / measured - 1,
        "phase": plan["peak"]["phase"],
        "parts": plan["phases"][plan["peak"]["phase"]]["parts"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="settings")
    parser.add_argument("--rollout_batch_size", type=int, default=64)
    parser.add_argument("--calibration_prompts", type=int, default=64)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="root of the code that is run")
    parser.add_argument("--output", type=Path, help="JSON file that the results are written to, after each")
    given = parser.parse_args()
    results = []
    for name in given.only:
        results.append(compare(name, given))
        planned, measured = (results[-1][f"{kind}_bytes"] / 1e9 for kind in ("planned", "measured"))
        apart = planned / measured - 1
        print(f"{name:<28} planned {planned:6.2f} GB, measured {measured:6.2f} GB, {apart:+.1%}", flush=True)
        if given.output:
            given.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(abs(result["difference"]) > BAR for result in results))


if __name__ == "__main__":
    sys.exit(main())
