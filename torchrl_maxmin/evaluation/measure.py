"""Run the evaluation stage: policies answer held-out prompts, a judge scores them for every group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_maxmin.core.distributed import across_ranks, is_main_process, world_size
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.core.run import (
    resolve_device,
    seed_everything,
)
from torchrl_maxmin.core.run_folder import how_to_go_on, stage
from torchrl_maxmin.evaluation.cache import FOLDER, Samples, Verdicts, digest_of, digest_of_model
from torchrl_maxmin.evaluation.judging import UtilityJudge, load_judge
from torchrl_maxmin.evaluation.mixture import mixture_figures, read_summary, trained_with
from torchrl_maxmin.evaluation.report import rich_table, write_cards, write_report
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.samples import responses_to_show
from torchrl_maxmin.evaluation.settings import EvaluateConfig
from torchrl_maxmin.evaluation.summary import summarise, write_summary
from torchrl_maxmin.models.loading import (
    load_tokenizer,
    require_causal_lm,
    same_vocabulary,
    saved_ends,
    set_pad_token,
)
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.models.sequences import require_positions
from torchrl_maxmin.preferences.chat import Text, is_conversational
from torchrl_maxmin.preferences.io.files import load_prompts
from torchrl_maxmin.preferences.texts import plain_text
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.functions import extra_columns
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.rollouts.certificate import score_responses

__all__ = ["EvaluateConfig", "measure_policies", "run_evaluate"]

#: what an evaluation is of
INPUTS = ("policies", "dataset_name", "judge", "reward_model_path")
MAY_CHANGE = ("judge_refusals", "judge_retries", "judge_retry_after", "judge_timeout")


@across_ranks
@stage("evaluate", inputs=INPUTS, may_change=MAY_CHANGE)
def run_evaluate(config: EvaluateConfig) -> Path:
    """Measure policies and write ``summary.json``, reports and plots; returns the folder.

    Reports are ``report.md`` and ``report.html``. What was found is added to the model cards of the policies'
    folders that have one of ours.
    """
    result, folder = _measure(config)
    if is_main_process():
        summary = summarise([result])
        write_report(folder, summary)
        write_cards(config.folders(), summary)
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
    folder = Path(config.output_dir)
    judge = load_judge(
        config.judge,
        texts,
        device,
        config.judge_model,
        config.judge_criteria,
        table,
        timeout=config.judge_timeout,
        retries=config.judge_retries,
        retry_after=config.judge_retry_after,
        refusals=config.judge_refusals,
        verdicts=Verdicts(folder / FOLDER),
    )
    mixture = None
    if config.reward_model_path:
        mixture = load_reward_model(config.reward_model_path).to(device)
        reward = read_summary(config.reward_model_path)
        trained = trained_with(folders[config.certify]) if config.certify in folders else {}
    columns: dict[str, Any] = {}
    if isinstance(judge, UtilityJudge) and judge.function is not None:
        columns = extra_columns([judge.function.function], table, range(len(texts)))
    seed_everything(config.seed)  # as below: a new pad token's row is random
    reference = config.load_policy(folders[REFERENCE], tokenizer, device)
    prompts = encode_prompts(tokenizer, texts, config.max_prompt_length)
    for model_config in model_configs:
        require_positions(model_config, prompts["prompt_tokens"].shape[-1], config.response_length)

    utilities, kl, length = {}, {}, {}
    scorers: dict[str, MixtureRewards] = {}
    responses: dict[str, TensorDict] = {}
    shape = (len(texts), config.num_samples)
    samples = Samples(folder / FOLDER)
    with progress_bar("evaluating policies", len(folders)) as advance:
        for name, path in folders.items():
            seed_everything(config.seed)
            policy = config.load_policy(path, tokenizer, device)
            responses[name] = sampled = samples.of(
                _digest(path, prompts, tokenizer, config, device),
                partial(sample_responses, policy, prompts, config.num_samples),
            )
            seed_everything(config.seed)  # what follows must not tell samples that were drawn from kept ones
            if mixture is not None:
                scorers[name] = MixtureRewards(mixture, tokenizer, texts, policy.ends)
            if isinstance(judge, UtilityJudge):
                with _way_on(folder):
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
        with _way_on(folder):
            wins, extra["judge_first_place"] = judge.compare(texts, answers)
    if mixture is not None:
        extra |= mixture_figures(
            config, scorers, reward, trained, judge.group_names, utilities, responses, prompts, reference
        )
    groups = judge.group_names, judge.group_shares
    result = SeedResult(config.seed, *groups, utilities, kl, length, extra, wins, judge.shares_are)

    def read(name: str, rows: Sequence[int]) -> list[str]:
        return [plain_text(text) for text in to_texts(tokenizer, responses[name][list(rows)], texts)[1]]

    extra["responses"] = responses_to_show(result, [plain_text(text) for text in texts], read)
    if is_main_process():
        result.save(folder / "result")
    return result, folder


@contextlib.contextmanager
def _way_on(folder: Path) -> Iterator[None]:
    """Say in a judge's error that the work until then is not lost."""
    try:
        yield
    except UserError as error:
        way = how_to_go_on(folder, "evaluate")
        raise UserError(f"{error}; samples and verdicts are kept; {way}") from error


def _digest(
    path: str, prompts: TensorDict, tokenizer: Any, config: EvaluateConfig, device: torch.device
) -> str:
    """Name all that decides the samples of a policy."""
    names = ("seed", "num_samples", "response_length", "distributed")
    settings = {name: getattr(config, name) for name in names} | config.sampling_options()
    tokens = prompts.select("prompt_tokens", "prompt_mask").to_dict()
    places = [device.type, world_size(), tokenizer.pad_token_id, torch.__version__, version("transformers")]
    return digest_of(settings, tokens, places, digest_of_model(path))


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
