"""Rewards by functions that users write: how they are called, and what they may give."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.errors import RewardError, UserError
from torchrl_maxmin.core.importing import import_named
from torchrl_maxmin.core.limits import OutOfTime, call_within
from torchrl_maxmin.core.text_escape import terminal
from torchrl_maxmin.models.sampling import to_texts
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import as_completion, distinct_texts
from torchrl_maxmin.rewards.source import NonFiniteRewards
from torchrl_maxmin.world import World

__all__ = [
    "FunctionRewards",
    "FunctionTimeout",
    "UserFunction",
    "distinct_rows",
    "extra_columns",
    "load_functions",
]

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> floats [N] or [N, k]
_WANTED = "it must give one number, or one a group, for every response"


class FunctionTimeout(RewardError):
    """A function gave nothing in time."""


class UserFunction:
    """A function that a user wrote: its calls are counted and limited, and what it gives is checked.

    Args:
        function: ``f(prompts, completions)``; further columns go to one that takes them by name.
        role: what the function is, for messages.
        timeout: seconds that a call may take; 0 for no limit.
        flag: what raises the limit, for messages.

    Attributes:
        width: how many numbers a response it gives; not known before the first call.
        calls: how many there were.

    Example:
        >>> lengths = UserFunction(lambda prompts, completions: [len(text) for text in completions])
        >>> lengths(["p", "p"], ["one", "three"]).tolist()
        [[3.0], [5.0]]
    """

    def __init__(
        self,
        function: RewardFunction,
        role: str = "reward function",
        timeout: float = 0.0,
        flag: str = "--reward_timeout",
    ):
        self.function, self.timeout, self.flag = function, timeout, flag
        self.name = f"{role} {getattr(function, '__name__', type(function).__name__)}"
        self.width: int | None = None
        self.calls = 0

    def probe(self, prompts: Sequence[Text], columns: Mapping[str, Sequence[Any]] | None = None) -> int:
        """How many groups it speaks for: called on two responses, before thousands are sampled.

        Args:
            prompts: those that it knows.
            columns: one value a prompt.

        Raises:
            RewardError: where it fails, or its answer is not one that a call takes.
        """
        places = (0, min(1, len(prompts) - 1))
        pair = [prompts[place] for place in places]
        completions = [as_completion(text, pair[0]) for text in ("c", "d e")]
        given = {name: [values[place] for place in places] for name, values in (columns or {}).items()}
        return self(pair, completions, given).shape[1]

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> np.ndarray:
        """Call it on N responses.

        Args:
            prompts: strings or conversations.
            completions: strings or lists of messages.
            columns: one value a response, for what it takes by name.

        Returns:
            Floats [N, k], NaN where the function gave None.

        Raises:
            NonFiniteRewards: for NaN or infinity.
            FunctionTimeout: where it takes too long.
            RewardError: where it fails, or gives anything else, or another k than before.
        """
        self.calls += 1
        name = f"call {self.calls}: the {self.name}"
        try:
            answer = call_within(self.timeout, _call, self.function, prompts, completions, columns or {})
        except OutOfTime as error:
            raise FunctionTimeout(f"{name} gives {error}; mend it, or raise {self.flag}") from error
        except UserError as error:  # a world's
            raise RewardError(f"{name} refuses: {error}") from error
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"{name} fails on f(prompts, completions) with {type(error).__name__}: "
                f"{terminal(error, 300)}; {_WANTED}"
            ) from error
        values = _numbers(name, answer, len(prompts))
        if self.width not in (None, values.shape[1]):
            raise RewardError(
                f"{name} gave {self.width} number(s) a response at first, and gives {values.shape[1]} now; "
                f"{_WANTED}"
            )
        self.width = values.shape[1]
        return values


def _numbers(name: str, answer: Any, num_responses: int) -> np.ndarray:
    """What a function gave as floats [N, k], NaN for None."""
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu()
    try:
        values = np.asarray(answer, dtype=object if _holds_none(answer) else float)
        absent = np.array([value is None for value in values.flat], dtype=bool).reshape(values.shape)
        values = np.where(absent, 0.0, values).astype(float)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} gives no numbers ({terminal(error, 300)}); {_WANTED}") from error
    if values.ndim not in (1, 2) or len(values) != num_responses or 0 in values.shape[1:]:
        found = f"numbers of shape {list(values.shape)} for {num_responses} responses"
        raise RewardError(f"{name} gives {found}; {_WANTED}")
    with np.errstate(over="ignore"):  # as they will be read
        finite = np.isfinite(values.astype(np.float32)).all()
    if not finite:
        raise NonFiniteRewards(f"{name} gives NaN or infinity for some response; {_WANTED}")
    return np.where(absent, np.nan, values).reshape(num_responses, -1)


class FunctionRewards:
    """Rewards [B, K] by plain functions ``f(prompts, completions, **columns)``, as TRL's trainers call them.

    Strings stay strings and conversations lists of messages. A function gives one number a response, or one a
    group; None leaves a response out of that group's mean. Each is called once to begin with.

    Args:
        functions: each gives one column [N], or several [N, k].
        tokenizer: the policy's.
        prompts: the texts that ``prompt_index`` counts; a function may know no others.
        columns: further columns of the data, one value a prompt, for functions that take them.
        timeout: seconds that a call may take; 0 for no limit.

    Raises:
        RewardError: for a function that fails, or gives anything else.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        tokenizer: Any,
        prompts: Sequence[Text] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        timeout: float = 0.0,
    ):
        self.functions = [UserFunction(function, timeout=timeout) for function in functions]
        self.tokenizer, self.prompts, self.columns = tokenizer, prompts, columns or {}
        known = ("a", "b") if prompts is None else prompts
        self.num_groups = sum(function.probe(known, self.columns) for function in self.functions)

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses; NaN where a function gave None.

        Raises:
            NonFiniteRewards: for a number that is NaN or infinite.
            RewardError: where a function fails, and for what is no number, or another number of groups than
                at first.
        """
        index = responses.get("prompt_index", None)
        texts = to_texts(self.tokenizer, responses, None if index is None else self.prompts)
        columns = {} if index is None else self.columns
        columns = {name: [values[i] for i in index.tolist()] for name, values in columns.items()}
        values = [function(*texts, columns) for function in self.functions]
        return torch.from_numpy(np.concatenate(values, -1)).to(responses["action"].device, torch.float32)


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
