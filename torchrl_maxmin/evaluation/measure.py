"""Run the evaluation stage: policies answer held-out prompts, a judge scores them for every group."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensordict import TensorDict

from torchrl_maxmin.core.distributed import MODES, across_ranks, is_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.core.run import (
    resolve_device,
    seed_everything,
)
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.evaluation.judging import UtilityJudge, load_judge
from torchrl_maxmin.evaluation.report import rich_table, write_report
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.summary import summarise, write_summary
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import (
    load_tokenizer,
    reading,
    require_causal_lm,
    same_vocabulary,
    saved_ends,
    set_pad_token,
)
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.models.sequences import penalise_missing_eos, require_positions
from torchrl_maxmin.models.settings import SamplingSettings
from torchrl_maxmin.models.sharding import shard_policy
from torchrl_maxmin.preferences.chat import ChatSettings, Text, is_conversational
from torchrl_maxmin.preferences.io.files import load_prompts
from torchrl_maxmin.rewards import Calibration, load_reward_model
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.functions import extra_columns
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.rollouts.certificate import policy_certificate, score_responses

__all__ = ["EvaluateConfig", "measure_policies", "run_evaluate"]

#: what an evaluation is of
INPUTS = ("policies", "dataset_name", "judge", "reward_model_path")
MAY_CHANGE = ("judge_retries", "judge_timeout")


@dataclass
class EvaluateConfig(SamplingSettings, ChatSettings):
    """Results by group of several policies on held-out prompts.

    Args:
        policies: policy folders as name=folder; sft, the reference, must be one of them.
        dataset_name: held-out prompts; file, saved dataset or hub name with a column prompt of strings or
            lists of messages.
        output_dir: folder for the results; must be empty or absent.
        judge: who says what a response is worth to each group; a world's json, module:function
            f(prompts, completions) that gives one column a group, or a reward folder (its heads, by the
            calibration it holds). Or who says which of two is better; module:function f(prompts, a, b), a
            dict of these by group, or the address of an OpenAI-compatible endpoint.
        judge_model: name that the endpoint has for its model; the key is read from OPENAI_API_KEY.
        judge_criteria: what each group wants, as name=words; one judge each at the endpoint.
        reward_model_path: the reward mixture that trained the policies; adds its figures, the
            calibration's sensitivity and the certificate.
        certify: policy whose distance to the optimum is certified under that mixture.
        beta: KL weight of the certified objective; by default the one that the policy was trained with.
        certificate_prompts: prompts that the certificate uses, its units; fewer than 16 give none, and the
            fewer the wider it is.
        certificate_samples: responses a prompt, half of the policy, half of the reference; a multiple
            of 4.
        reward_bound: largest size that a calibrated reward of any response can have, a penalty for a
            missing end included; by default responses that nobody drew are taken to be worth no more than
            the best one drawn for their prompt.
        num_samples: responses a prompt of every policy.
        num_prompts: use the first so many prompts; 0 uses all.
        response_length: most tokens of a response.
        max_prompt_length: longest prompt in tokens.
        dataset_split: split of the prompts.
        resume_from_checkpoint: last goes on with the evaluation in output_dir.
        seed: seed of the sampling, and the number that the results are filed under.
        device: cpu, cuda or auto.
        distributed: none, or what each of the processes holds that torchrun starts (torchrun --nproc_per_node
            N -m torchrl_maxmin evaluate ...); ddp, all weights, or fsdp2, a part of every policy's. Each
            answers, scores and judges a share of the responses; figures are those of one such process.
    """

    policies: list[str]
    dataset_name: str
    output_dir: str
    judge: str
    judge_model: str | None = None
    judge_criteria: list[str] | None = None
    reward_model_path: str | None = None
    certify: str = "maxmin"
    beta: float | None = None
    certificate_prompts: int = 64
    certificate_samples: int = 128
    reward_bound: float | None = None
    num_samples: int = 4
    num_prompts: int = 0
    response_length: int = 53
    max_prompt_length: int = 512
    dataset_split: str = "test"
    resume_from_checkpoint: str | None = None
    seed: int = 0
    device: str = "auto"
    distributed: str = "none"

    def folders(self) -> dict[str, str]:
        """Policy folders by name; raises :class:`UserError` for what is no name=folder."""
        pairs = [spec.partition("=") for spec in self.policies]
        odd = [name for name, _, path in pairs if not path]
        if odd:
            raise UserError(f"--policies takes name=folder; {odd[0]!r} has no folder")
        folders = {name: path for name, _, path in pairs}
        if len(folders) < len(pairs):
            raise UserError("--policies names one twice; give each a name of its own")
        if REFERENCE not in folders:
            raise UserError(f"--policies needs {REFERENCE}=folder, the reference that all are compared with")
        return folders

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        if len(self.folders()) < 2:
            raise UserError(f"--policies needs name=folder of a policy to compare with {REFERENCE}")
        self.require_seed()
        self.require_known(distributed=MODES)
        self.check_sampling()
        self.require_at_least(1, "num_samples", "response_length", "max_prompt_length", "certificate_prompts")
        self.require_at_least(0, "num_prompts")
        self.require_positive("beta", "reward_bound")
        named = self.certify != type(self).certify
        given = {"certify": named, "beta": self.beta, "reward_bound": self.reward_bound}
        flags = [f"--{name}" for name, value in given.items() if value]
        if flags and not self.reward_model_path:
            flag = flags[0]
            raise UserError(f"{flag} needs --reward_model_path, whose certificate it is about")
        if named and self.certify not in self.folders():
            raise UserError(f"--certify {self.certify!r} is none of --policies: {', '.join(self.folders())}")
        if self.certificate_samples < 4 or self.certificate_samples % 4:
            raise UserError("--certificate_samples must be a positive multiple of 4")


@across_ranks
@stage("evaluate", inputs=INPUTS, may_change=MAY_CHANGE)
def run_evaluate(config: EvaluateConfig) -> Path:
    """Measure policies and write ``summary.json``, ``report.md`` and plots; returns the folder."""
    result, folder = _measure(config)
    if is_main_process():
        summary = summarise([result])
        write_report(folder, summary)
        write_summary(folder, summary)
        console.print(rich_table(summary))
    return folder


@across_ranks
@stage("evaluate", inputs=INPUTS, may_change=MAY_CHANGE, result="result/result.json")
def measure_policies(config: EvaluateConfig) -> Path:
    """Measure policies and save the raw result alone; seeds are summarised together later."""
    return _measure(config)[1]


def _measure(config: EvaluateConfig) -> tuple[SeedResult, Path]:
    folders = config.folders()
    device = resolve_device(config.device)
    model_configs = [require_causal_lm(path) for path in folders.values()]
    table, texts = load_prompts(config.dataset_name, config.dataset_split, "evaluate")
    texts = texts[: config.num_prompts or None]
    tokenizer = _shared_tokenizer(config, folders, texts)
    judge = load_judge(config.judge, texts, device, config.judge_model, config.judge_criteria, table)
    mixture = None
    if config.reward_model_path:
        mixture = load_reward_model(config.reward_model_path).to(device)
        reward = _read_summary(config.reward_model_path)
        trained = _trained_with(folders[config.certify]) if config.certify in folders else {}
    folder = Path(config.output_dir)
    columns: dict[str, Any] = {}
    if isinstance(judge, UtilityJudge) and judge.function is not None:
        columns = extra_columns([judge.function.function], table, range(len(texts)))
    seed_everything(config.seed)  # as below: a new pad token's row is random
    reference = _load_policy(folders[REFERENCE], tokenizer, config, device)
    prompts = encode_prompts(tokenizer, texts, config.max_prompt_length)
    for model_config in model_configs:
        require_positions(model_config, prompts["prompt_tokens"].shape[-1], config.response_length)

    utilities, kl, length = {}, {}, {}
    scorers: dict[str, MixtureRewards] = {}
    responses: dict[str, TensorDict] = {}
    shape = (len(texts), config.num_samples)
    with progress_bar("evaluating policies", len(folders)) as advance:
        for name, path in folders.items():
            seed_everything(config.seed)
            policy = _load_policy(path, tokenizer, config, device)
            responses[name] = sampled = sample_responses(policy, prompts, config.num_samples)
            if mixture is not None:
                scorers[name] = MixtureRewards(mixture, tokenizer, texts, policy.ends)
            if isinstance(judge, UtilityJudge):
                found = judge(sampled, tokenizer, texts, columns, policy.ends)
                utilities[name] = found.reshape(*shape, -1)
            ratio = sampled["sample_log_prob"] - score_responses(
                reference, sampled, config.scoring_batch_size
            )
            kl[name] = ratio.sum(-1).double().numpy().reshape(shape)
            length[name] = sampled["action_mask"].sum(-1).double().numpy().reshape(shape)
            advance(note=name)
    extra: dict[str, Any] = {"judge": judge.kind}
    wins: dict[str, np.ndarray] = {}
    if not isinstance(judge, UtilityJudge):
        count = config.num_samples
        answers = {}
        for name, sampled in responses.items():
            completions = to_texts(tokenizer, sampled, texts)[1]
            answers[name] = [completions[n : n + count] for n in range(0, len(completions), count)]
        wins, extra["judge_first_place"] = judge.compare(texts, answers)
    if mixture is not None:
        extra |= _mixture_figures(
            config, scorers, reward, trained, judge.group_names, utilities, responses, prompts, reference
        )
    groups = judge.group_names, judge.group_shares
    result = SeedResult(config.seed, *groups, utilities, kl, length, extra, wins, judge.shares_are)
    if is_main_process():
        result.save(folder / "result")
    return result, folder


def _shared_tokenizer(config: EvaluateConfig, folders: dict[str, str], texts: Sequence[Text]) -> Any:
    """The reference's tokenizer, which prompts all policies; its pad token ends no policy's responses.

    Raises:
        UserError: where a policy reads other tokens than the reference, or other words around a message.
    """
    files = ("tokenizer_config.json", "tokenizer.json")  # a folder may hold weights alone
    own = {
        name: load_tokenizer(path)
        for name, path in folders.items()
        if not Path(path).is_dir() or any((Path(path) / file).is_file() for file in files)
    }
    tokenizer = own.get(REFERENCE) or load_tokenizer(folders[REFERENCE])
    templated = config.chat_template is None and any(map(is_conversational, texts))
    for name, other in own.items():
        pair = f"{REFERENCE} ({folders[REFERENCE]}) and {name} ({folders[name]})"
        if not same_vocabulary(tokenizer, other):
            raise UserError(
                f"{pair} have different vocabularies, so they do not read the same tokens; give policies of "
                "one base model, or the folder its right tokenizer"
            )
        if templated and (tokenizer.chat_template or None) != (other.chat_template or None):
            raise UserError(
                f"{pair} have different chat templates, system prompt included, and the prompts are "
                "messages; give the one that holds for all by --chat_template: a folder's "
                "chat_template.jinja, or none"
            )
    # before prompts are encoded: the reference would have no row for a pad token that a later policy adds
    set_pad_token(tokenizer, [end for path in folders.values() for end in saved_ends(path)])
    return config.apply_chat(tokenizer)


def _load_policy(path: str, tokenizer: Any, config: EvaluateConfig, device: torch.device) -> TokenPolicy:
    policy = TokenPolicy.from_pretrained(
        path, tokenizer, max_new_tokens=config.response_length, device=device, **config.sampling_options()
    )
    if config.distributed == "fsdp2":
        shard_policy(policy)
    return policy


@torch.no_grad()
def _mixture_figures(
    config: EvaluateConfig,
    scorers: dict[str, MixtureRewards],
    reward: dict[str, Any],
    trained: dict[str, Any],
    group_names: list[str],
    utilities: dict[str, np.ndarray],
    responses: dict[str, TensorDict],
    prompts: TensorDict,
    reference: TokenPolicy,
) -> dict[str, Any]:
    """Compute what the reward mixture adds: EM's figures, calibration sensitivity, certificate."""
    extra: dict[str, Any] = {}
    raw = scorers[REFERENCE].in_batches(responses[REFERENCE])
    extra["em"] = {
        "num_groups_selected": raw.shape[-1],
        "user_accuracy": reward.get("user_accuracy"),
        "heldout_log_likelihood": reward.get("heldout", {}).get("log_likelihood"),
        "head_accuracy": reward.get("heldout", {}).get("head_accuracy"),
    }
    heads = reward.get("head_of_group", {})
    if all(name in heads for name in group_names):
        if utilities:
            truth = utilities[REFERENCE].reshape(len(raw), -1)
            extra["em"]["head_correlation"] = {
                name: float(np.corrcoef(raw[:, heads[name]].numpy(), truth[:, g])[0, 1])
                for g, name in enumerate(group_names)
            }
        extra["group_users"] = [reward["users"][heads[name]] for name in group_names]
    if config.certify not in responses:
        reason = f"no policy named {config.certify!r} was evaluated; name the one meant by --certify"
        extra["certificate"] = {**_NOTHING, "reason": reason}
        return extra
    names = {head: name for name, head in heads.items()}
    target = scorers[config.certify].in_batches(responses[config.certify])
    own, target = (rewards.reshape(len(prompts), config.num_samples, -1) for rewards in (raw, target))
    found: dict[str, tuple[Calibration, torch.Tensor]] = {}
    for method in CALIBRATIONS:
        with contextlib.suppress(UserError):  # one sample a prompt, or a constant head, has no scale
            calibration = Calibration.fit(own, method)
            found[method] = calibration, calibration.apply(target, own.unsqueeze(1)).mean((0, 1))
    groups = [names.get(k, f"group {k}") for k in range(own.shape[-1])]
    utilities_by = {
        method: dict(zip(groups, means.tolist(), strict=True)) for method, (_, means) in found.items()
    }
    used = trained.get("calibration", {}).get("method")
    extra["calibration"] = {"used": used, "utilities": utilities_by}
    if used in found:
        extra["calibration"]["offsets"] = _offsets(*found[used], groups, trained)
    extra["certificate"] = _certificate(config, scorers[config.certify], trained, prompts, reference, own)
    return extra


def _offsets(
    calibration: Calibration, means: torch.Tensor, groups: list[str], trained: dict[str, Any]
) -> dict[str, Any] | None:
    """Say how large the prompts' offsets are, and what they would do to a rollout's worst group."""
    if calibration.offset_deviation is None or calibration.within_deviation is None:
        return None
    by_prompt = Calibration.from_dict(trained["calibration"]).by_prompt
    num_prompts = max(1, trained.get("rollout_batch_size", 1) // trained.get("num_generations", 1))
    samples = trained.get("baseline_samples") if by_prompt else None
    deviation = (calibration.offset_deviation / calibration.within_deviation).tolist()
    return {
        "deviation": dict(zip(groups, deviation, strict=True)),
        "by_prompt": by_prompt,
        "num_prompts": num_prompts,
        "wrong_worst_group": calibration.wrong_worst_group(means, num_prompts, samples),
    }


_NOTHING: dict[str, Any] = {"value": None, "low": None, "high": None}


def _read_summary(folder: str) -> dict[str, Any]:
    """Read what a stage wrote of itself, where it did."""
    path = Path(folder) / "summary.json"
    with reading("summary.json", folder):
        return json.loads(path.read_text()) if path.is_file() else {}


def _trained_with(folder: str) -> dict[str, Any]:
    """Read the settings that a policy was trained with, and what came of them, where its folder has them."""
    settings = Path(folder) / "config.yaml"
    with reading("config.yaml", folder):
        given = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
        return {**given, **_read_summary(folder)}


def _certificate(
    config: EvaluateConfig,
    source: MixtureRewards,
    trained: dict[str, Any],
    prompts: TensorDict,
    reference: TokenPolicy,
    own: torch.Tensor,
) -> dict[str, Any]:
    """Certify the gap of a policy to the max-min optimum under the rewards that it was trained on."""
    beta = config.beta if config.beta is not None else trained.get("kl_coef")
    if config.truncated:
        return {**_NOTHING, "reason": "top_k and top_p leave out tokens that the optimum may need"}
    if "calibration" not in trained:
        return {**_NOTHING, "reason": f"the folder of {config.certify} does not say how it was trained"}
    if not beta:
        return {**_NOTHING, "reason": "without a KL penalty (beta 0) the optimum has no closed form"}
    calibration = Calibration.from_dict(trained["calibration"])
    if trained.get("reward_funcs") or len(calibration.shift) != source.num_groups:
        return {**_NOTHING, "reason": f"{config.certify} was not trained on this reward mixture"}
    seed_everything(config.seed)
    device = next(reference.parameters()).device
    policy = _load_policy(config.folders()[config.certify], source.tokenizer, config, device)
    penalty = trained.get("missing_eos_penalty", 0.0)

    def rewards(responses: TensorDict) -> torch.Tensor:
        samples = own[responses["prompt_index"].cpu()] if calibration.by_prompt else None
        calibrated = calibration.apply(source.in_batches(responses), samples).double()
        return penalise_missing_eos(calibrated, responses, source.ends, penalty)

    some = prompts[: config.certificate_prompts]
    certificate = policy_certificate(
        policy, reference, rewards, some, config.certificate_samples, beta, reward_bound=config.reward_bound
    )
    return asdict(certificate)
