"""Time of a PPO iteration of the embedded world's language model, beside that of another checkout.

    python benchmarks/ppo_iteration.py --other ../before
    python benchmarks/ppo_iteration.py --other ../before --pairs 1 --iterations 2

Each checkout runs in processes of its own, in turn, on the same untrained model, rewards and prompts; a
figure is the median time of an iteration (rollout, rewards, advantages, updates, log) after the first, of its
one thread's processor, so that others on the machine count little. The other's figure divides ours; with the
median over pairs above 1.00 the exit status is 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import importlib, json, sys, time
import torch
torch.set_num_threads(1)
from torchrl_maxmin.core import run
from torchrl_maxmin.trainers.ppo_config import PPOConfig
try:
    module = importlib.import_module("torchrl_maxmin.trainers.lm_ppo")
except ImportError:
    module = importlib.import_module("torchrl_maxmin.trainers.ppo")
times, write = [], run.MetricsLog.write
def watched(*args):
    write(*args)
    times.append(time.process_time())
run.MetricsLog.write = watched
module.run_ppo(PPOConfig(**json.loads(sys.argv[1])))
print(json.dumps([later - sooner for sooner, later in zip(times, times[1:])]))
"""


def prepare(folder: Path) -> dict:
    """Write an untrained model, its reward mixture and prompts; returns settings as the demo's."""
    import torch

    from torchrl_maxmin.rewards import RewardMixture
    from torchrl_maxmin.world.world import write_world

    write_world(folder, 0, num_texts=10, num_prompts=400, num_test_prompts=10)
    torch.manual_seed(0)
    RewardMixture.from_causal_lm(str(folder / "base_model"), 2).save_pretrained(folder / "reward")
    return {
        "model_name_or_path": str(folder / "base_model"),
        "reward_model_path": str(folder / "reward"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "rollout_batch_size": 192,
        "mini_batch_size": 96,
        "num_ppo_epochs": 2,
        "response_length": 24,
        "max_prompt_length": 16,
        "calibration_prompts": 64,
        "device": "cpu",
    }


def iteration_seconds(checkout: Path, settings: dict, folder: Path) -> float:
    """The median time of an iteration in a process of this checkout."""
    paths = os.pathsep.join([str(checkout / "kernels"), str(checkout)])
    quiet = {"TORCHRL_MAXMIN_QUIET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as output:
        given = json.dumps(settings | {"output_dir": f"{output}/run"})
        result = subprocess.run(
            [sys.executable, "-B", "-c", CHILD, given],
            env=os.environ | quiet | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return statistics.median(json.loads(result.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=9)
    given = parser.parse_args()
    here, ratios = Path(__file__).parents[1], []
    with tempfile.TemporaryDirectory() as name:
        settings = prepare(Path(name)) | {"num_iterations": given.iterations}
        for pair in range(given.pairs):
            order = [here, given.other.resolve()]
            seconds = {
                root: iteration_seconds(root, settings, Path(name))
                for root in (order if pair % 2 == 0 else order[::-1])
            }
            ours, other = (seconds[root] for root in order)
            ratios.append(ours / other)
            print(
                f"pair {pair + 1}: {ours:.3f} s, the other {other:.3f} s, ratio {ratios[-1]:.3f}", flush=True
            )
    middle = statistics.median(ratios)
    print(f"median ratio {middle:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    return int(middle > 1.0)


if __name__ == "__main__":
    sys.exit(main())
