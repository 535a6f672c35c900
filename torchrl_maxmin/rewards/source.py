"""Group rewards of sampled responses, from a reward mixture or from functions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_maxmin.core.distributed import over_ranks
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.importing import import_named
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import sample_responses, to_texts
from torchrl_maxmin.models.sequences import Ends, has_ended, in_batches
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import as_completion, distinct_texts
from torchrl_maxmin.rewards.base import RewardModel
from torchrl_maxmin.world import World

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> floats [N] or [N, k]
_RESPONSE_KEYS: tuple[NestedKey, ...] = ("prompt_tokens", "prompt_mask", "action", "action_mask")
_WANTED = "it must give one number, or one a group, for every response"


class NonFiniteRewards(UserError):
    """A reward function gave NaN or infinity."""


class MixtureRewards:
    """Raw rewards [B, K] of responses by a mixture or an ensemble.

    A model with the policy's own tokenizer reads the tokens themselves. Any other reads the texts, and no end
    where a response was cut off. :attr:`shared_vocabulary` says which. With stop strings all read texts: the
    end of one is a token behind them that no policy wrote.

    Args:
        mixture: the reward model.
        tokenizer: the policy's.
        prompts: the texts that ``prompt_index`` counts; read back from their tokens when None.
        ends: what ends a response, see :attr:`~torchrl_maxmin.models.language.TokenPolicy.ends`; the
            tokenizer's EOS when None.
    """

    def __init__(
        self,
        mixture: RewardModel,
        tokenizer: Any,
        prompts: Sequence[Text] | None = None,
        ends: Ends | None = None,
    ):
        self.mixture, self.tokenizer, self.prompts = mixture, tokenizer, prompts
        self.ends: Ends = ends or (tokenizer.eos_token_id,)
        self.num_groups = mixture.num_groups
        self.shared_vocabulary = mixture.reads_tokens_of(tokenizer)

    @torch.no_grad()
    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses.

        Raises:
            NonFiniteRewards: for a reward that is NaN or infinite.
        """
        return _require_finite(self._read(responses))

    @torch.no_grad()
    def in_batches(self, responses: TensorDict, batch_size: int = 512) -> Tensor:
        """Score responses on the model's device, so many at once; returns rewards [N, K] on the CPU.

        Processes that work as one read a share each.

        Raises:
            NonFiniteRewards: for a reward that is NaN or infinite, in all processes.
        """
        device = next(self.mixture.parameters()).device

        def score(share: TensorDict) -> Tensor:
            return in_batches(lambda part: self._read(part.to(device)).cpu(), share, batch_size)

        return _require_finite(over_ranks(score, responses))

    def _read(self, responses: TensorDictBase) -> Tensor:
        by_tokens = self.shared_vocabulary and not callable(self.ends)
        return self._of_tokens(responses) if by_tokens else self._of_texts(responses)

    def _of_texts(self, responses: TensorDictBase) -> Tensor:
        known = None if responses.get("prompt_index", None) is None else self.prompts
        texts = to_texts(self.tokenizer, responses, known)
        ended = has_ended(responses, self.ends).flatten().tolist()
        return self.mixture.score(*texts, ended=ended).to(responses["action"].device)

    def _of_tokens(self, responses: TensorDictBase) -> Tensor:
        tokens = torch.cat([responses["prompt_tokens"], responses["action"]], -1)
        mask = torch.cat([responses["prompt_mask"], responses["action_mask"]], -1)
        longest = int(responses["action_mask"].sum(-1).max()) - responses["action"].shape[-1]
        return self.mixture(tokens[:, :longest], mask[:, :longest]) if longest else self.mixture(tokens, mask)


def _require_finite(rewards: Tensor) -> Tensor:
    if not bool(rewards.isfinite().all()):
        raise NonFiniteRewards("the reward model gives NaN or infinity for some response")
    return rewards


class RewardModule(TensorDictModuleBase):
    """Writes the rewards of K groups for tokens that a policy wrote.

    TorchRL's ``HFRewardModelWrapper`` takes models with one reward; this one keeps all K as the
    last dimension, and reads the same keys if told to.

    Args:
        model: mixture or ensemble.
        tokenizer: the policy's; where it is not the model's own, prompt and response travel as text.
        in_keys: prompt tokens, prompt mask, response tokens and response mask, as
            :class:`~torchrl_maxmin.models.language.TokenPolicy` writes them; or two keys, tokens
            and mask of whole texts in the model's own vocabulary, such as TorchRL's
            ``("tokens", "full")`` and ``("masks", "all_attention_mask")``.
        out_key: where rewards [*B, K] go.
        calibrated: apply the model's calibration.
        prompts: the texts that the tensordict's ``prompt_index`` counts, strings or conversations; a model
            with another tokenizer then reads them, in place of what their tokens read back as.
        eos_token_ids: tokens that end a response, or what marks its ends, such as ``policy.ends``; the
            tokenizer's EOS when None.

    Raises:
        ValueError: for another number of keys, and for whole texts in another vocabulary.

    Example:
        >>> rewards = RewardModule(mixture, tokenizer)  # doctest: +SKIP
        >>> rewards(policy(prompts))["next", "reward"].shape  # doctest: +SKIP
        torch.Size([64, 2])
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Any,
        *,
        in_keys: Sequence[NestedKey] = _RESPONSE_KEYS,
        out_key: NestedKey = ("next", "reward"),
        calibrated: bool = True,
        prompts: Sequence[Text] | None = None,
        eos_token_ids: Ends | None = None,
    ):
        super().__init__()
        if len(in_keys) not in (2, 4):
            raise ValueError(f"in_keys are tokens and mask, of prompt and response or of both, not {in_keys}")
        self.source = MixtureRewards(model, tokenizer, prompts, eos_token_ids)
        if len(in_keys) == 2 and not self.source.shared_vocabulary:
            raise ValueError(
                "whole texts can be read in the model's own vocabulary alone; give keys of prompt and answer"
            )
        self.in_keys, self.out_keys = list(in_keys), [out_key]
        self.model, self.calibrated = model, calibrated

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write rewards [*B, K]."""
        values = [tensordict.get(key, as_padded_tensor=True) for key in self.in_keys]
        batch = values[0].shape[:-1]
        flat = [value.reshape(-1, value.shape[-1]) for value in values]
        if len(flat) == 2:
            rewards = self.model(flat[0], flat[1].bool())
        else:
            rows = TensorDict(dict(zip(_RESPONSE_KEYS, flat, strict=True)), [len(flat[0])])
            if (index := tensordict.get("prompt_index", None)) is not None:
                rows["prompt_index"] = index.reshape(-1)
            rewards = self.source(rows)
        if self.calibrated:
            rewards = self.model.calibration.apply(rewards)
        tensordict.set(self.out_keys[0], rewards.reshape(*batch, -1))
        return tensordict


class FunctionRewards:
    """Rewards [B, K] by plain functions ``f(prompts, completions, **columns)``, as TRL's trainers call them.

    Strings stay strings and conversations lists of messages. A function gives one number a response, or one a
    group; None leaves a response out of that group's mean. Each is called once to begin with.

    Args:
        functions: each gives one column [N], or several [N, k].
        tokenizer: the policy's.
        prompts: the texts that ``prompt_index`` counts; a function may know no others.
        columns: further columns of the data, one value a prompt, for functions that take them.

    Raises:
        UserError: for a function that fails, or gives anything else.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        tokenizer: Any,
        prompts: Sequence[Text] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ):
        self.functions, self.tokenizer, self.prompts = list(functions), tokenizer, prompts
        self.columns = columns or {}
        probe = ("a", "b") if prompts is None else prompts
        self.widths = [count_columns(f, "reward function", probe, self.columns) for f in self.functions]
        self.num_groups = sum(self.widths)

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses; NaN where a function gave None.

        Raises:
            NonFiniteRewards: for a number that is NaN or infinite.
            UserError: for what is no number, and another number of groups than at first.
        """
        index = responses.get("prompt_index", None)
        texts = to_texts(self.tokenizer, responses, None if index is None else self.prompts)
        columns = {} if index is None else self.columns
        columns = {name: [values[i] for i in index.tolist()] for name, values in columns.items()}
        values = [ask(f, *texts, "reward function", columns) for f in self.functions]
        for function, width, given in zip(self.functions, self.widths, values, strict=True):
            if given.shape[1] != width:
                raise UserError(
                    f"the {_named(function, 'reward function')} gave {width} number(s) a response at first, "
                    f"and gives {given.shape[1]} now; {_WANTED}"
                )
        return torch.from_numpy(np.concatenate(values, -1)).to(responses["action"].device, torch.float32)


def ask(
    function: RewardFunction,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    role: str,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> np.ndarray:
    """Call a function on N responses.

    Args:
        function: ``f(prompts, completions)``; ``columns`` go to one that takes them by name.
        prompts: strings or conversations.
        completions: strings or lists of messages.
        role: what the function is, for messages.
        columns: one value a response.

    Returns:
        Floats [N, k], NaN where the function gave None.

    Raises:
        NonFiniteRewards: for NaN or infinity.
        UserError: where the answer is anything else.
    """
    answer, role = _call(function, prompts, completions, columns or {}), _named(function, role)
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu()
    try:
        values = np.asarray(answer, dtype=object if _holds_none(answer) else float)
        absent = np.array([value is None for value in values.flat], dtype=bool).reshape(values.shape)
        values = np.where(absent, 0.0, values).astype(float)
    except (TypeError, ValueError) as error:
        raise UserError(f"the {role} gives no numbers ({error}); {_WANTED}") from error
    if values.ndim not in (1, 2) or len(values) != len(prompts):
        found = f"numbers of shape {list(values.shape)} for {len(prompts)} responses"
        raise UserError(f"the {role} gives {found}; {_WANTED}")
    if not np.isfinite(values).all():
        raise NonFiniteRewards(f"the {role} gives NaN or infinity for some response; {_WANTED}")
    return np.where(absent, np.nan, values).reshape(len(prompts), -1)


def _call(
    function: RewardFunction,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
) -> Any:
    """Call by name where the function names what TRL gives by name, else by place."""
    parameters = _parameters(function)
    named = {"prompts": prompts, "completions": completions}
    others = {name: columns[name] for name in _taken(function, columns)}
    if not named.keys() & parameters.keys():
        return function(prompts, completions, **others)
    named = {name: texts for name, texts in named.items() if _takes_all(parameters) or name in parameters}
    return function(**{**others, **named})


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return {}


def _takes_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _holds_none(answer: Any) -> bool:
    """Whether None stands for a response or for one of its groups."""
    if not isinstance(answer, list | tuple):
        return False
    return any(row is None or (isinstance(row, list | tuple) and None in row) for row in answer)


def _taken(function: RewardFunction, names: Iterable[str]) -> list[str]:
    """The names among these that a function takes by keyword."""
    parameters = _parameters(function)
    by_name = bool({"prompts", "completions"} & parameters.keys())
    given = {"prompts", "completions", *([] if by_name else list(parameters)[:2])}  # by name or by place
    return [n for n in names if n not in given and (_takes_all(parameters) or n in parameters)]


def fill_absent(rewards: Tensor, neutral: Tensor) -> Tensor:
    """Replace NaN in rewards [B, K], no reward, by its group's mean over the other responses.

    Where no response has a reward, all get the group's ``neutral`` reward [K], the reference's mean: equal
    rewards prefer no response, and the adversary sees a group as well off as under the reference.
    """
    means = rewards.nanmean(0)
    means = torch.where(means.isnan(), neutral.to(means), means)
    return torch.where(rewards.isnan(), means, rewards)


def extra_columns(functions: Sequence[RewardFunction], table: Any, rows: Sequence[int]) -> dict[str, list]:
    """Read the columns of a table that some function takes by name, at these rows."""
    names = [name for name in table.column_names if name not in ("prompt", "prompts", "completions")]
    taken = {name for function in functions for name in _taken(function, names)}
    part = table.select(rows) if taken else table
    return {name: part[name][:] for name in names if name in taken}


def distinct_rows(prompts: Sequence[Text], columns: Mapping[str, Sequence[Any]]) -> list[int]:
    """Return the place of the first of every group of rows with equal prompts and columns, in order.

    Args:
        prompts: N strings or conversations.
        columns: what :func:`extra_columns` gives for all N rows: one prompt with two reference answers is two
            prompts to a function that reads the answer.

    Example:
        >>> distinct_rows(["a", "b", "a", "a"], {"answer": [1, 1, 2, 1]})
        [0, 1, 2]
    """
    rows = zip(prompts, *columns.values(), strict=True)
    return distinct_texts([json.dumps(row, sort_keys=True, default=str) for row in rows])


def count_columns(
    function: RewardFunction,
    role: str,
    prompts: Sequence[Text],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> int:
    """How many groups a function speaks for: called on two responses, before thousands are sampled.

    Raises:
        UserError: where it fails, or its answer is not one that :func:`ask` takes.
    """
    places = (0, min(1, len(prompts) - 1))
    pair = [prompts[place] for place in places]
    completions = [as_completion(text, pair[0]) for text in ("c", "d e")]
    given = {name: [values[place] for place in places] for name, values in (columns or {}).items()}
    try:
        values = ask(function, pair, completions, role, given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the {_named(function, role)} fails on f(prompts, completions) with {type(error).__name__}: "
            f"{error}; {_WANTED}"
        ) from error
    return values.shape[1]


def _named(function: RewardFunction, role: str) -> str:
    return f"{role} {getattr(function, '__name__', type(function).__name__)}"


def load_functions(specs: Sequence[str]) -> list[RewardFunction]:
    """Functions by name: ``module:function``, or the path of a world's json.

    Raises:
        UserError: for a name that leads nowhere.
    """
    return [_load_function(spec) for spec in specs]


def _load_function(spec: str) -> RewardFunction:
    if spec.endswith(".json"):
        if not Path(spec).is_file():
            raise UserError(f"no world file {spec!r}")
        return World.load(spec)
    try:
        return import_named(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"no reward function {spec!r}: write module:function, importable from here"
        ) from error


def reference_rewards(
    reference: TokenPolicy,
    prompts: TensorDict,
    rewards: MixtureRewards | FunctionRewards,
    num_samples: int,
    scoring_batch_size: int = 512,
) -> Tensor:
    """Raw rewards [X, n, K] on the CPU of n samples of the reference policy for each of X prompts.

    NaN stands where a function gave None.

    Raises:
        NonFiniteRewards: where a reward is NaN or infinite.
    """
    device = next(reference.parameters()).device
    samples = sample_responses(reference, prompts, num_samples)

    def score(some: TensorDictBase) -> Tensor:
        return in_batches(lambda part: rewards(part.to(device)).cpu(), some, scoring_batch_size)

    raw = over_ranks(score, samples)
    return raw.reshape(len(prompts), num_samples, -1)
