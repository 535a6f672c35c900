"""What groups cost: a PPO update with eight groups against one, and a collector against bare generation.

    python benchmarks/fairness.py

Three questions, each with both sides in turn in one process: time and peak memory of a whole PPO update
(advantages, minibatches, gradients, optimizer) on responses of a tiny GPT-2 and on steps of an environment
with an MLP; responses a second of ``MaxMinCollector`` beside ``generate`` alone. Writes
``results/DEVICE/fairness.csv``.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_bench.device import Cpu, cpu_name
from kernel_bench.report import folder_name
from maxmin_kernels import token_gae
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor
from transformers import GPT2Config, GPT2LMHeadModel

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.models import TokenCritic, TokenPolicy, TokenScorer
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.objectives import MaxMinPPOLoss, scalarise_advantage, whiten
from torchrl_maxmin.welfare import EntropyRegularized

VOCABULARY, PROMPT, RESPONSE = 512, 16, 32
Call = Callable[[], object]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=128,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
        )
    )


def policy_of(model: nn.Module) -> TokenPolicy:
    return TokenPolicy(model, eos_token_id=1, pad_token_id=0, max_new_tokens=RESPONSE)


def prompts(count: int) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCABULARY, (count, PROMPT), generator=generator)
    return TensorDict(
        {"prompt_tokens": tokens, "prompt_mask": torch.ones_like(tokens, dtype=torch.bool)}, [count]
    )


def step(loss: MaxMinPPOLoss, optimizer: torch.optim.Optimizer, data: TensorDict, size: int) -> None:
    """One pass of minibatches."""
    for minibatch in data.split(size):
        losses = loss(minibatch)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        optimizer.step()


def token_update(groups: int, responses: int = 64) -> Callable[[], None]:
    """A PPO update of a language model on given responses."""
    policy, critic = policy_of(tiny_gpt2()), TokenCritic(backbone_of(tiny_gpt2(1)), groups + 1)
    loss = MaxMinPPOLoss(
        TokenScorer(policy), critic, functional=False, entropy_bonus=False, loss_mask_key="action_mask"
    )
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)
    batch = policy(prompts(responses))
    batch["ref_log_prob"] = batch["sample_log_prob"] + 0.1
    batch["next"] = TensorDict({"reward": torch.randn(responses, groups)}, [responses])
    batch["group_weights"] = torch.full((responses, groups), 1 / groups)

    def update() -> None:
        with torch.no_grad():
            critic(batch)
            columns, batch["value_target"] = token_gae(
                batch["next", "reward"],
                batch["state_value"],
                batch["action_mask"],
                gamma=1.0,
                lmbda=0.95,
                sample_log_prob=batch["sample_log_prob"],
                ref_log_prob=batch["ref_log_prob"],
                kl_coef=0.05,
            )
            weighted = scalarise_advantage(columns, batch["group_weights"])
            batch["advantage"] = whiten(weighted, batch["action_mask"])
        step(loss, optimizer, batch, responses // 2)

    return update


def step_update(groups: int, envs: int = 64, steps: int = 64, width: int = 128) -> Callable[[], None]:
    """A PPO update of an MLP on steps of an environment."""
    torch.manual_seed(0)

    def mlp(outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
        )

    actor = ProbabilisticActor(
        TensorDictModule(mlp(6), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )
    critic = TensorDictModule(mlp(groups), ["observation"], ["state_value"])
    loss = MaxMinPPOLoss(actor, critic, normalize_advantage=True)
    loss.set_keys(sample_log_prob="sample_log_prob")
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
    shape = (envs, steps)
    done = torch.rand(*shape, 1) < 0.05
    data = TensorDict(
        {
            "observation": torch.randn(*shape, 16),
            "action": torch.randint(6, shape),
            "sample_log_prob": torch.full(shape, -1.8),
            "group_weights": torch.full((*shape, groups), 1 / groups),
            "next": {
                "observation": torch.randn(*shape, 16),
                "reward": torch.randn(*shape, groups),
                "done": done,
                "terminated": done,
            },
        },
        shape,
    )

    def update() -> None:
        with torch.no_grad():
            loss.value_estimator(
                data,
                params=loss.critic_network_params.detach(),
                target_params=loss.target_critic_network_params,
            )
        flat = data.exclude("next", "group_weights").flatten(0, 1)
        step(loss, optimizer, flat, envs * steps // 4)

    return update


def generation(batch: int = 128) -> tuple[Call, Call, Call]:
    """Bare generation of one batch; that and the log-probabilities; the collector's, with eight groups."""
    policy = policy_of(tiny_gpt2().eval())
    asked = prompts(batch)
    rewards = torch.randn(VOCABULARY, 8)

    def group_rewards(data: TensorDict) -> Tensor:
        return (rewards[data["action"]] * data["action_mask"][..., None]).mean(1)

    env = TokenEnv(
        asked,
        group_rewards,
        num_groups=8,
        num_prompts=batch,
        max_new_tokens=RESPONSE,
        eos_token_id=1,
        vocab_size=VOCABULARY,
    )
    collector = MaxMinCollector(
        env, policy, adversary=EntropyRegularized(8), frames_per_batch=batch, total_frames=-1
    )
    batches = iter(collector)

    def bare() -> Tensor:
        return policy.model.generate(
            input_ids=asked["prompt_tokens"],
            attention_mask=asked["prompt_mask"].long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=RESPONSE,
            eos_token_id=1,
            pad_token_id=0,
        )

    def scored() -> Tensor:
        """What any PPO needs: the sampled tokens' log-probabilities too."""
        return policy(asked.clone())

    return bare, scored, lambda: next(batches)


def in_turn(*calls: Call, repeats: int) -> list[float]:
    """Median seconds of each, one after the other in every round."""
    times: list[list[float]] = [[] for _ in calls]
    for round_index in range(repeats + 2):
        for mine, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if round_index >= 2:
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = Cpu(threads=2)
    rows = []
    for name, make in (("tokens, tiny GPT-2", token_update), ("steps, MLP", step_update)):
        one, eight = make(1), make(8)
        seconds = in_turn(one, eight, repeats=args.repeats)
        memory = [device.peak_bytes(call) for call in (one, eight)]
        rows.append([f"PPO update, {name}", "K=8 / K=1", "time", *seconds, seconds[1] / seconds[0]])
        rows.append([f"PPO update, {name}", "K=8 / K=1", "peak bytes", *memory, memory[1] / memory[0]])
    plain, with_scores, ours = in_turn(*generation(), repeats=args.repeats)
    rows.append(["128 responses", "generate / collector", "time", ours, plain, plain / ours])
    rows.append(
        ["128 responses", "generate and score / collector", "time", ours, with_scores, with_scores / ours]
    )
    out = (
        args.output or Path(__file__).parent / "results" / folder_name(cpu_name(), False, []) / "fairness.csv"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "ratio of", "quantity", "first", "second", "ratio"])
        for row in rows:
            writer.writerow([f"{x:.4g}" if isinstance(x, float) else x for x in row])
            print(" | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    print(f"results: {out}")


if __name__ == "__main__":
    main()
