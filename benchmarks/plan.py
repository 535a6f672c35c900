"""The peak memory that `torchrl-maxmin plan` foretells, beside what a run of the same settings takes.

    python benchmarks/plan.py --model_name_or_path runs/smollm2                 # every setting, minutes each
    python benchmarks/plan.py --model_name_or_path runs/smollm2 --only full lora

Every setting is one iteration of PPO in a process of its own, whose peak is the operating system's (resident
set, libraries included), and a plan from the config alone. The bars: a plan is within 15% of its run; what
adapters in bfloat16 take is at most 1.15 times their plan, and .30 of full fine-tuning in float32. A miss is
exit status 1.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import ROOT, facts, peak_of, results_file, words, write, write_prompts
from tokenizers import Tokenizer

BAR = 0.15
#: of adapters in bfloat16: peak over the plan, and over that of full fine-tuning in float32
OVER_PLAN, OVER_FULL = 1.15, 0.30
GROUPS = 2
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


def tokens_of(prompts: Path, model: str) -> int:
    """Tokens of the longest prompt."""
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    return max(len(tokenizer.encode(json.loads(line)["prompt"])) for line in prompts.open())


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Plan one setting and run it."""
    settings = dict(SETTINGS[name])
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(prompts)
        common = {
            "model_name_or_path": str(Path(given.model_name_or_path).resolve()),
            "reward_funcs": ["race_rewards:short", "race_rewards:vowels"]
            * (settings.pop("groups", GROUPS) // 2),
            "max_prompt_length": tokens_of(prompts, given.model_name_or_path),
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
        package = ["-m", "torchrl_maxmin"]
        peak_of([*package, "plan", *flags, *groups, "--output_dir", f"{folder}/plan"], threads=given.threads)
        plan = json.loads(Path(f"{folder}/plan/summary.json").read_text())
        rest = {"dataset_name": str(prompts), "output_dir": f"{folder}/run", "num_iterations": 1}
        measured, _ = peak_of(
            [*package, "ppo", *flags, *words(only | rest)], given.checkout.resolve(), threads=given.threads
        )
    planned = plan["peak"]["bytes"]
    return {
        "setting": name,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "difference": planned / measured - 1,
        "phase": plan["peak"]["phase"],
        "parts": plan["phases"][plan["peak"]["phase"]]["parts"],
    }


def bars(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is asked of the settings that were measured, and whether it holds."""
    by_name = {result["setting"]: result for result in results}
    found = {
        f"plan of {name}": {"value": abs(result["difference"]), "bar": BAR}
        for name, result in by_name.items()
    }
    if small := by_name.get("lora, bfloat16"):
        found["lora, bfloat16 over its plan"] = {
            "value": small["measured_bytes"] / small["planned_bytes"],
            "bar": OVER_PLAN,
        }
        if full := by_name.get("full"):
            found["lora, bfloat16 over full"] = {
                "value": small["measured_bytes"] / full["measured_bytes"],
                "bar": OVER_FULL,
            }
    return {name: {**bar, "holds": bar["value"] <= bar["bar"]} for name, bar in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="settings")
    parser.add_argument("--rollout_batch_size", type=int, default=64)
    parser.add_argument("--calibration_prompts", type=int, default=64)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="root of the code that is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/plan.json")
    given = parser.parse_args()
    output = given.output or results_file("plan.json")
    results: list[dict[str, Any]] = []
    for name in given.only:
        results.append(compare(name, given))
        planned, measured = (results[-1][f"{kind}_bytes"] / 1e9 for kind in ("planned", "measured"))
        apart = planned / measured - 1
        print(f"{name:<28} planned {planned:6.2f} GB, measured {measured:6.2f} GB, {apart:+.1%}", flush=True)
        model = Path(given.model_name_or_path).resolve().name
        here = {"environment": facts(threads=given.threads), "model": model}
        write(output, here | {"settings": results, "bars": bars(results)})
    missed = [name for name, bar in bars(results).items() if not bar["holds"]]
    print(f"bars missed: {', '.join(missed)}" if missed else "all bars hold")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
