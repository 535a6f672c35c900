"""Peak memory of a PPO update in micro-batches, beside the whole minibatch at once.

    python benchmarks/micro_batches.py                    # GPT-2 of 12 layers x 256, 64 rows of 256 tokens
    python benchmarks/micro_batches.py --tokens 64        # the same with a quarter of the activations
    python benchmarks/micro_batches.py --quick            # seconds; a small model, not judged

Every size runs in a process of its own: policy, reference and critic are built, and the peak over one update
(forward, backward, AdamW) is what the process holds above them. On a GPU it is what the allocator says. At
full size a micro-batch of 4 may need at most 0.35 of what 64 rows at once need, or the exit status is 1.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from em_iteration import memory
from tensordict import TensorDict
from transformers import GPT2Config, GPT2LMHeadModel

from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.ppo_config import PPOConfig

BAR, GROUPS = 0.35, 2


def parts(given: argparse.Namespace, micro: int, folder: str) -> tuple[Any, TensorDict]:
    """A learner of two groups, and responses of full length with all that it reads."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=given.vocabulary,
        n_embd=given.width,
        n_layer=given.layers,
        n_head=8,
        n_positions=given.tokens,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    prompt = response = given.tokens // 2
    model = GPT2LMHeadModel(config).to(given.device).eval()
    reference = TokenPolicy(model, eos_token_id=1, pad_token_id=0, max_new_tokens=response)
    models = FullCopies(reference, None, GROUPS + 1, scoring_batch_size=4)
    rows, shape = given.rows, (given.rows, response)
    batch = TensorDict(
        {
            "prompt_tokens": torch.randint(2, given.vocabulary, (rows, prompt)),
            "prompt_mask": torch.ones(rows, prompt, dtype=torch.bool),
            "action": torch.randint(2, given.vocabulary, shape),
            "action_mask": torch.ones(shape, dtype=torch.bool),
            "advantage": torch.randn(*shape, 1),
            "value_target": torch.randn(*shape, GROUPS + 1),
        },
        [rows],
    ).to(given.device)
    batch["sample_log_prob"] = models.log_prob(batch)
    settings = PPOConfig(
        "", "", output_dir=folder, num_ppo_epochs=1, mini_batch_size=rows, per_device_train_batch_size=micro
    )
    return Learner(settings, models, 1, rows, loss_mask_key="action_mask"), batch


def peak(given: argparse.Namespace, micro: int) -> float:
    """MiB that an update holds at its peak beyond the weights."""
    with tempfile.TemporaryDirectory() as folder:
        learner, batch = parts(given, micro, folder)
        if given.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            learner.update(batch)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        held = memory("VmRSS")
        learner.update(batch)
        return memory("VmHWM") - held


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=256, help="of prompt and response together")
    parser.add_argument("--rows", type=int, default=64, help="responses an optimizer step")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 4], help="micro-batches; the whole first"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small model, measured and not judged")
    parser.add_argument("--only", type=int, help="measure one size in this process")
    given = parser.parse_args()
    if given.quick:
        given.layers, given.width, given.vocabulary, given.tokens, given.rows = 2, 64, 512, 32, 16
        given.sizes = [16, 4]
    torch.set_num_threads(1)
    if given.only:
        print(json.dumps(peak(given, given.only)))
        return 0
    peaks = {}
    for size in given.sizes:
        command = [sys.executable, *sys.argv, "--only", str(size)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[size] = float(result.stdout.splitlines()[-1])
        whole = peaks[given.sizes[0]]
        print(f"micro-batch {size:3}: {peaks[size]:9.1f} MiB beyond the weights, {peaks[size] / whole:.3f}")
    if not given.quick and peaks[given.sizes[-1]] > BAR * whole:
        print(f"bar missed: more than {BAR} of the whole")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
