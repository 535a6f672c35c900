"""A real chat model through the four verbs, and one score for one completion wherever it is read.

    python reproductions/real_model/run.py [--model_name_or_path runs/smollm2] [--runs runs/real_model]

Makes SmolLM2-135M-Instruct where it is not there yet, lets it answer 24 chat prompts, lets simulated people
choose between its answers, and runs sft (2 steps), reward (2 steps), ppo (2 iterations) and evaluate on
messages. Then the scores that ppo gave and those that evaluate gives are compared, completion by completion.
Writes results.json, results.csv and results.md beside this file; exits with 1 where they differ by over 1e-5
and by more than float32's rounding explains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from chats import PROMPTS, write_chats
from scores import Comparison, RecordedRewards, classifier_scores, write_scores
from smollm2 import DEFAULT_FOLDER, make
from tensordict import TensorDict

from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import prepare_output_dir, seed_everything, write_json
from torchrl_maxmin.evaluation.judging import UtilityJudge, load_judge
from torchrl_maxmin.evaluation.measure import EvaluateConfig, run_evaluate
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.preferences.io.files import load_prompts
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

HERE = Path(__file__).parent
#: tokens of a response: enough for some to end, few enough that others are cut off
RESPONSE_LENGTH = 40
BAR = 1e-5


def sample_answers(model: Path, conversations: Sequence[Any], num_answers: int = 2) -> list[list[str]]:
    """Answers [N][n] of a chat model at temperature 1."""
    tokenizer = load_tokenizer(str(model))
    policy = TokenPolicy.from_pretrained(str(model), tokenizer, max_new_tokens=RESPONSE_LENGTH)
    seed_everything(0)
    sampled = sample_responses(policy, encode_prompts(tokenizer, conversations), num_answers, batch_size=16)
    texts = to_texts(tokenizer, sampled)[1]
    return [texts[i : i + num_answers] for i in range(0, len(texts), num_answers)]


def settings(model: Path, files: dict[str, Path], runs: Path) -> dict[str, Any]:
    """Settings of the four verbs by name: small, to be done in minutes on two cores."""
    sft, reward, ppo = (str(runs / name) for name in ("sft", "reward", "ppo"))
    length = {"response_length": RESPONSE_LENGTH}
    return {
        "sft": SFTConfig(
            str(model), str(files["sft"]), sft, max_steps=2, per_device_train_batch_size=4,
            completion_only_loss=True,
        ),
        "reward": RewardConfig(
            sft, str(files["preferences"]), reward, num_groups=2, num_rounds=1, steps_per_round=2,
            per_device_train_batch_size=4, calibration_prompts=8, **length,
        ),
        "ppo": PPOConfig(
            sft, str(files["prompts"]), output_dir=ppo, reward_model_path=reward, num_iterations=2,
            rollout_batch_size=8, mini_batch_size=4, num_ppo_epochs=1, warmup_iterations=0,
            calibration_prompts=8, **length,
        ),
        "evaluate": EvaluateConfig(
            [f"sft={sft}", f"maxmin={ppo}"], str(files["heldout"]), str(runs / "evaluate"), judge=reward,
            reward_model_path=reward, num_samples=2, certificate_prompts=2, certificate_samples=8, **length,
        ),
    }  # fmt: skip


def run_recorded_ppo(config: PPOConfig) -> tuple[TensorDict, torch.Tensor]:
    """Run the policy stage; returns its responses [N] and the raw scores [N, K] that it gave them."""
    parts = build_ppo(config)
    rewards = parts.rollouts.rewards
    rewards.source = recorded = RecordedRewards(rewards.source)
    train_policy(config, parts)
    return recorded.record()


def compare_rollouts(configs: dict[str, Any], responses: TensorDict, raw: torch.Tensor) -> Comparison:
    """What evaluate's judge says of the responses that ppo sampled and scored while it ran."""
    config: PPOConfig = configs["ppo"]
    reward = str(config.reward_model_path)
    _, texts = load_prompts(config.dataset_name, config.dataset_split, "ppo")
    tokenizer = load_tokenizer(config.output_dir)
    judge = load_judge(configs["evaluate"].judge, texts, torch.device("cpu"))
    assert isinstance(judge, UtilityJudge)
    assert judge.mixture is not None
    calibrate = judge.mixture.calibration.apply
    eos = tokenizer.eos_token_id
    return Comparison.make(
        "ppo's rollouts",
        responses,
        eos,
        ppo=calibrate(raw),
        evaluate=torch.from_numpy(judge(responses, tokenizer, texts, {}, [eos])),
        transformers=calibrate(classifier_scores(reward, texts, responses)),
        transformers_float32=calibrate(classifier_scores(reward, texts, responses, torch.float32)),
    )


def compare_evaluation(config: EvaluateConfig, policy: str) -> Comparison:
    """What ppo's scorer says of the responses of a policy that evaluate sampled, and filed its scores of.

    evaluate files scores and lengths, not texts: its responses are sampled again by its seed, and their
    lengths must be those that it filed.

    Raises:
        RuntimeError: where they are not.
    """
    result = SeedResult.load(Path(config.output_dir) / "result")
    _, texts = load_prompts(config.dataset_name, config.dataset_split, "evaluate")
    tokenizer = load_tokenizer(config.folders()["sft"])
    prompts = encode_prompts(tokenizer, texts, config.max_prompt_length)
    seed_everything(config.seed)
    model = TokenPolicy.from_pretrained(
        config.folders()[policy], tokenizer, max_new_tokens=config.response_length
    )
    responses = sample_responses(model, prompts, config.num_samples)
    lengths = responses["action_mask"].sum(-1)
    if lengths.tolist() != result.length[policy].flatten().tolist():
        raise RuntimeError("the responses sampled again are not those that evaluate scored")
    reward = str(config.reward_model_path)
    mixture = load_reward_model(reward)
    calibrate = mixture.calibration.apply
    return Comparison.make(
        f"evaluate's samples of {policy}",
        responses,
        tokenizer.eos_token_id,
        ppo=calibrate(MixtureRewards(mixture, tokenizer, texts)(responses)),
        evaluate=torch.from_numpy(result.utilities[policy]).flatten(0, 1),
        transformers=calibrate(classifier_scores(reward, texts, responses)),
        transformers_float32=calibrate(classifier_scores(reward, texts, responses, torch.float32)),
    )


def run_all(model: Path, runs: Path) -> tuple[list[Comparison], dict[str, float]]:
    """Run the four verbs; returns the comparisons and the seconds of every step."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        console.print(name, highlight=False)
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - start
        return result

    answers = timed("answers to choose from", sample_answers, model, PROMPTS)
    files = write_chats(runs / "data", PROMPTS, answers)
    configs = settings(model, files, runs)
    timed("sft", run_sft, configs["sft"])
    timed("reward", run_reward, configs["reward"])
    recorded = timed("ppo", run_recorded_ppo, configs["ppo"])
    timed("evaluate", run_evaluate, configs["evaluate"])
    comparisons = [
        timed("comparison of ppo's rollouts", compare_rollouts, configs, *recorded),
        *(
            timed(f"comparison of {name}'s samples", compare_evaluation, configs["evaluate"], name)
            for name in configs["evaluate"].folders()
        ),
    ]
    return comparisons, seconds


def write(folder: Path, comparisons: Sequence[Comparison], seconds: dict[str, float]) -> str:
    """Write results.json, results.csv and results.md; returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {comparison.of: comparison.summary() for comparison in comparisons}
    pairs = ("ppo and evaluate", "ppo and transformers", "evaluate and transformers", "float32 and float64")
    largest = {pair: max(summary[pair] for summary in summaries.values()) for pair in pairs}
    write_json(
        folder / "results.json",
        {"bar": BAR, "largest_difference": largest, "completions": summaries, "seconds": seconds},
    )
    write_scores(folder / "results.csv", comparisons)
    lines = [
        f"| {of} | {s['completions']} | {s['ended']} | {' and '.join(f'{d:.2f}' for d in s['spread'])} | "
        + " | ".join(f"{s[pair]:.1e}" for pair in pairs)
        + " |"
        for of, s in summaries.items()
    ]
    text = "\n".join(
        [
            "# A real chat model: one score for one completion",
            "",
            "SmolLM2-135M-Instruct, chat prompts as messages (single questions, system messages, several "
            "turns) through `sft` (2 steps), `reward` (2 steps), `ppo` (2 iterations) and `evaluate`. "
            "Written by `run.py`; every score: `results.csv`. Calibrated rewards of both groups, which the "
            "verbs compute in float32; `transformers` is the reward folder as a sequence classifier in "
            "float64, one row at a time, without this package. The last column is what float32 does to that "
            "reader alone.",
            "",
            "| completions | number | with an end | standard deviation of the scores | "
            + " | ".join(f"largest difference, {pair}" for pair in pairs)
            + " |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
            f"The largest difference of ppo and evaluate is {largest[pairs[0]]:.1e}; the bar is {BAR:.0e}.",
            "",
            "| step | seconds |",
            "|---|---:|",
            *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
            "",
        ]
    )
    (folder / "results.md").write_text(text)
    return text


def main() -> int:
    """Run the verbs, compare and write; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--model_name_or_path", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--runs", type=Path, default=Path("runs/real_model"), help="new folder of the runs")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()
    runs = prepare_output_dir(given.runs)
    comparisons, seconds = run_all(make(given.model_name_or_path), runs)
    print(write(given.output_dir, comparisons, seconds))  # noqa: T201
    return int(not all(comparison.alike(BAR) for comparison in comparisons))


if __name__ == "__main__":
    run_main("real_model", main)
