"""A contestant of ``benchmarks/adapters.py``: iterates when it is told to, and says how long each took.

    python benchmarks/contestants/contestant.py ours SETTINGS FOLDER    # iterates at every line on stdin

Each is a process of its own: none runs in memory that another one has cut up.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from race_rewards import short, vowels

ANSWER = "iteration "
Settings = dict[str, Any]


class Finished(Exception):
    """Nothing more is asked for."""


class Turns:
    """Waits for a line, and times what is done until the next wait."""

    def __init__(self) -> None:
        self.started: tuple[float, float] | None = None

    def wait(self) -> None:
        """Say how long the last turn took, and wait for the next one.

        Raises:
            Finished: where there is none.
        """
        if self.started is not None:
            wall, processor = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
            print(f"\n{ANSWER}{json.dumps({'wall': wall, 'processor': processor})}", flush=True)
        if not sys.stdin.readline():
            raise Finished
        self.started = time.perf_counter(), time.process_time()


class PacedRollouts:
    """Rollouts that wait for their turn before each batch."""

    def __init__(self, rollouts: Any, turns: Turns):
        self.rollouts, self.turns = rollouts, turns

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.rollouts)
        while True:
            self.turns.wait()
            yield next(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rollouts, name)


def package_config(settings: Settings, folder: Path, **more: Any) -> Any:
    """The package's own settings for what the others do."""
    from torchrl_maxmin.trainers.ppo_config import PPOConfig

    common = ("model_name_or_path", "rollout_batch_size", "mini_batch_size", "num_ppo_epochs")
    common += ("response_length", "lora_r", "learning_rate", "beta")
    return PPOConfig(
        dataset_name=settings["dataset_name"],
        output_dir=str(folder),
        reward_funcs=["race_rewards:short", "race_rewards:vowels"],
        use_peft=True,
        lora_alpha=2 * settings["lora_r"],
        calibration_prompts=16,
        num_iterations=10_000,
        warmup_iterations=0,
        device="cpu",
        **{name: settings[name] for name in common},
        **more,
    )


def ours(settings: Settings, folder: Path, turns: Turns, **more: Any) -> None:
    """The package's ``ppo``, whole: rollouts, rewards, adversary, advantages, updates, log."""
    from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy

    config = package_config(settings, folder, **more)
    parts = build_ppo(config)
    parts.rollouts = PacedRollouts(parts.rollouts, turns)
    train_policy(config, parts)


def ours_grpo(settings: Settings, folder: Path, turns: Turns) -> None:
    """The package's ``ppo --advantage grpo``, without a critic."""
    ours(settings, folder, turns, advantage="grpo", num_generations=settings["num_generations"])


def texts(settings: Settings) -> list[str]:
    """The prompts."""
    return [json.loads(line)["prompt"] for line in Path(settings["dataset_name"]).read_text().splitlines()]


def plain(settings: Settings, folder: Path, turns: Turns) -> None:
    """The loop by hand."""
    from plain_ppo import PlainPPO, PlainSettings

    fields = PlainSettings.__dataclass_fields__
    given = PlainSettings(**{name: value for name, value in settings.items() if name in fields})
    torch.manual_seed(0)
    loop = PlainPPO(settings["model_name_or_path"], texts(settings), [short, vowels], given)
    with (folder / "metrics.jsonl").open("w") as log:
        while True:
            turns.wait()
            log.write(json.dumps(loop.iterate()) + "\n")
            log.flush()


def trl(settings: Settings, folder: Path, turns: Turns) -> None:
    """TRL's ``GRPOTrainer`` with adapters."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    steps = settings["rollout_batch_size"] // settings["mini_batch_size"]

    class Paced(TrainerCallback):
        """Waits before the step that generates."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % (steps * settings["num_ppo_epochs"]) == 0:
                turns.wait()

    arguments = GRPOConfig(
        output_dir=str(folder),
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=settings["mini_batch_size"],
        steps_per_generation=steps,
        num_iterations=settings["num_ppo_epochs"],
        num_generations=settings["num_generations"],
        max_completion_length=settings["response_length"],
        beta=settings["beta"],
        temperature=1.0,
        loss_type="bnpo",  # a mean over the tokens of a minibatch, as the others take
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=10_000_000,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=settings["lora_r"],
        lora_alpha=2 * settings["lora_r"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    GRPOTrainer(
        model=settings["model_name_or_path"],
        reward_funcs=[short, vowels],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts(settings)}),
        peft_config=lora,
        callbacks=[Paced()],
    ).train()


CONTESTANTS = {"ours": ours, "ours_grpo": ours_grpo, "plain": plain, "trl": trl}


def main() -> None:
    name, given, folder = sys.argv[1:]
    settings = json.loads(given)
    torch.set_num_threads(settings["threads"])
    with suppress(Finished):
        CONTESTANTS[name](settings, Path(folder), Turns())


if __name__ == "__main__":
    main()
