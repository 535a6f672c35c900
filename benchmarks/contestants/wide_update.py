"""One PPO update of ``benchmarks/wide.py`` in this process, and the memory that it takes.

    python benchmarks/contestants/wide_update.py FOLDER SETTINGS    # the folder holds a config.json

Prints a json line: the peak of the process, and what it held before the update, in bytes. Log-probabilities
are the package's, or with ``plain`` those of the model's own logits by ``log_softmax``.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.making import make_networks
from torchrl_maxmin.models.sequences import position_ids
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.ppo_config import PPOConfig


def memory(field: str) -> float:
    """Bytes of this process: ``VmRSS`` (now) or ``VmHWM`` (its peak)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024.0


class PlainPolicy(TokenPolicy):
    """Scores by the logits of the whole sequence, as ``model(...)`` gives them, and ``log_softmax``."""

    def log_prob_and_entropy(self, tensordict: TensorDictBase, entropy: bool = True) -> tuple[Tensor, None]:
        """Log-probabilities [B, R] of ``action``; zero where masked."""
        action, mask = tensordict["action"], tensordict["action_mask"]
        tokens = torch.cat([tensordict["prompt_tokens"], action], -1)
        real = torch.cat([tensordict["prompt_mask"], mask], -1)
        with self.within():
            logits = self.model(
                input_ids=tokens, attention_mask=real.long(), position_ids=position_ids(real), use_cache=False
            ).logits
        log_probs = logits[:, -action.shape[1] - 1 : -1].float().log_softmax(-1)
        return log_probs.gather(-1, action[..., None]).squeeze(-1) * mask, None


def build(folder: str, settings: dict[str, Any]) -> tuple[Learner, TensorDict]:
    """Networks on one trunk of random weights, their learner, and responses of full length."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    rows, prompt, response = (settings[name] for name in ("rows", "prompt", "response"))
    ppo = PPOConfig(
        folder,
        "",
        output_dir=folder,
        dtype="bfloat16",
        use_peft=True,
        gradient_checkpointing=settings["gradient_checkpointing"],
        num_ppo_epochs=1,
        mini_batch_size=rows,
        per_device_train_batch_size=settings["micro"],
        scoring_batch_size=settings["micro"],
        device="cpu",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    kind = PlainPolicy if settings["plain"] else TokenPolicy
    policy = kind(model, eos_token_id=1, pad_token_id=0, max_new_tokens=response)
    columns = settings["groups"] + 1
    networks = make_networks(ppo, policy, None, columns, scoring_batch_size=ppo.scoring_batch_size)
    shape = (rows, response)
    batch = TensorDict(
        {
            "prompt_tokens": torch.randint(2, config.vocab_size, (rows, prompt)),
            "prompt_mask": torch.ones(rows, prompt, dtype=torch.bool),
            "action": torch.randint(2, config.vocab_size, shape),
            "action_mask": torch.ones(shape, dtype=torch.bool),
            "advantage": torch.randn(*shape, 1),
            "value_target": torch.randn(*shape, columns),
        },
        [rows],
    )
    return Learner(ppo, networks, 1, rows, loss_mask_key="action_mask"), batch


def main() -> None:
    folder, given = sys.argv[1:]
    learner, batch = build(folder, json.loads(given))
    # what the policy sampled with is not what is measured
    batch["sample_log_prob"] = torch.full(batch["action"].shape, -10.0)
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the weights
    held = memory("VmRSS")
    losses = learner.update(batch)
    print(json.dumps({"peak": memory("VmHWM"), "held": held, "loss": float(losses["loss"])}))


if __name__ == "__main__":
    main()
