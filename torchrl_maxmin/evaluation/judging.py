"""Judges of the evaluation stage: utilities of single responses, or comparisons of two."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_maxmin.core.distributed import each_row_once, of_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.limits import OutOfTime, call_within
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.evaluation.judges import EndpointJudge, Judge, judge_pairs
from torchrl_maxmin.models.sampling import to_texts
from torchrl_maxmin.models.sequences import Ends
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import as_completion
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.base import RewardModel
from torchrl_maxmin.rewards.ensemble import is_reward_model
from torchrl_maxmin.rewards.functions import UserFunction, extra_columns, load_functions
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.world import World

__all__ = ["PairJudges", "UtilityJudge", "load_judge"]


@dataclass(frozen=True)
class UtilityJudge:
    """Says what a response is worth to each group.

    Attributes:
        kind: ``world``, ``reward heads`` or ``function``.
        group_names: The G groups.
        group_shares: Population shares [G].
        mixture: The reward heads, whose calibrated rewards are the utilities.
        function: Of ``f(prompts, completions)``, one number a response or one a group.
    """

    kind: str
    group_names: list[str]
    group_shares: list[float]
    mixture: RewardModel | None = None
    function: UserFunction | None = None

    @property
    def shares_are(self) -> str:
        """Whose shares they are: ``true``, ``found`` or ``equal``, for a function that has none."""
        return {"world": "true", "reward heads": "found"}.get(self.kind, "equal")

    def __call__(
        self,
        responses: TensorDict,
        tokenizer: Any,
        prompts: Sequence[Text],
        columns: Mapping[str, Sequence[Any]],
        ends: Ends,
    ) -> np.ndarray:
        """Return the utilities [N, G] of sampled responses, read as the policy stage reads them.

        Args:
            responses: What the policy sampled, [N].
            tokenizer: The policy's.
            prompts: The texts that ``prompt_index`` counts.
            columns: Further columns of the data, one value a prompt, for a function that takes them.
            ends: What ends a response, see :attr:`~torchrl_maxmin.models.language.TokenPolicy.ends`.

        Raises:
            UserError: Where one is no number.
        """
        if self.mixture is not None:
            rewards = MixtureRewards(self.mixture, tokenizer, prompts, ends)
            return self.mixture.calibration.apply(rewards.in_batches(responses)).numpy()
        function = self.function
        assert function is not None

        def utilities(rows: slice) -> np.ndarray:
            part = responses[rows]
            texts = to_texts(tokenizer, part, prompts)
            places = part["prompt_index"].tolist()
            given = {name: [values[place] for place in places] for name, values in columns.items()}
            found = function(*texts, given)
            if np.isnan(found).any():
                raise UserError("the judge gives None for some response; it must say what each is worth")
            return found

        return np.concatenate(each_row_once(utilities, len(responses)))


@dataclass(frozen=True)
class PairJudges:
    """Say which of two responses is the better one, a judge a group.

    Attributes:
        kind: ``endpoint`` or ``comparisons``.
        judges: Group name -> judge.
    """

    kind: str
    judges: dict[str, Judge] = field(repr=False)

    @property
    def group_names(self) -> list[str]:
        """The G groups."""
        return list(self.judges)

    @property
    def group_shares(self) -> list[float]:
        """Equal shares [G]: judges do not say how many people they stand for."""
        return [1 / len(self.judges)] * len(self.judges)

    @property
    def shares_are(self) -> str:
        """Whose shares they are."""
        return "equal"

    def compare(
        self, prompts: Sequence[Text], responses: Mapping[str, Sequence[Sequence[Text]]]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Compare every policy with every other, in both orders.

        Args:
            prompts: N prompts.
            responses: Policy -> its responses to each prompt [N][M].

        Returns:
            Policy -> probability [N, P, G] that its response is better than each policy's, as
            :class:`~torchrl_maxmin.evaluation.results.SeedResult` takes it; and by group how much oftener
            the response shown first won.
        """
        names = list(responses)
        wins = {name: np.full((len(prompts), len(names), len(self.judges)), 0.5) for name in names}
        first_place = []
        pairs = [(i, j, names[i], names[j]) for j in range(len(names)) for i in range(j)]
        with progress_bar("judging pairs of policies", len(pairs)) as advance:
            for i, j, one, other in pairs:
                found = judge_pairs(self.judges, prompts, responses[one], responses[other])
                wins[one][:, j], wins[other][:, i] = found.wins, 1 - found.wins
                first_place.append(found.first_place)
                advance(note=f"{one} and {other}")
        bias = np.mean(first_place, axis=0) if first_place else np.zeros(len(self.judges))
        return wins, dict(zip(self.judges, bias.tolist(), strict=True))


def load_judge(
    spec: str,
    prompts: Sequence[Text],
    device: torch.device,
    model: str | None = None,
    criteria: Sequence[str] | None = None,
    table: Any = None,
    *,
    timeout: float | None = None,
    verdicts: MutableMapping[str, float] | None = None,
    **options: Any,
) -> UtilityJudge | PairJudges:
    """Load the judge that ``--judge`` names, and ask it once to see that it answers.

    Args:
        spec: A world's json, a reward folder, an endpoint's address, or ``module:name`` of a function
            ``f(prompts, completions)``, of one ``f(prompts, a, b)``, or of a dict group -> such a one.
        prompts: Those that it will be asked about; the first is asked about at once.
        device: Where reward heads compute.
        model: The endpoint's name of its model.
        criteria: What each group wants, ``name=words``; for an endpoint.
        table: The data that the prompts are a column of, for a function that takes other columns.
        timeout: Seconds for one request to an endpoint, or one call of a function.
        verdicts: Where an endpoint's verdicts are kept.
        options: ``retries``, ``retry_after`` and ``refusals`` of
            :class:`~torchrl_maxmin.evaluation.endpoint_judge.EndpointJudge`, its own where None.

    Raises:
        UserError: For a judge that is not there or does not answer.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if spec.startswith(("http://", "https://")):
        if timeout is not None:
            given["timeout"] = timeout
        if verdicts is not None:
            given["verdicts"] = verdicts
        return _answering(PairJudges("endpoint", _endpoint_judges(spec, model, criteria, given)), prompts[0])
    if model is not None or criteria is not None:
        raise UserError("--judge_model and --judge_criteria belong to a --judge that is an http address")
    for name in given:
        raise UserError(f"--judge_{name} belongs to a --judge that is an http address: leave it out")
    if is_reward_model(spec):
        mixture = load_reward_model(spec).to(device)
        names = [f"group {k}" for k in range(mixture.num_groups)]
        shares = mixture.log_prior.exp().cpu().tolist()
        return UtilityJudge("reward heads", names, shares, mixture=mixture)
    found: Any = load_functions([spec])[0]
    if not isinstance(found, Mapping | World) and _takes_pairs(
        found, [] if table is None else table.column_names
    ):
        found = {"group 0": found}
    if isinstance(found, Mapping):
        judges = {str(name): _in_time(judge, timeout) for name, judge in found.items()}
        return _answering(PairJudges("comparisons", judges), prompts[0])
    function = UserFunction(found, "judge", timeout or 0.0, flag="--judge_timeout")
    if isinstance(found, World):
        of_main_process(lambda: function.probe(prompts))
        return UtilityJudge("world", list(found.group_names), list(found.shares), function=function)
    columns = {} if table is None else extra_columns([found], table, range(min(2, len(table))))
    count = function.width = of_main_process(lambda: function.probe(prompts, columns))
    names = [f"group {k}" for k in range(count)]
    return UtilityJudge("function", names, [1 / count] * count, function=function)


def _in_time(judge: Judge, timeout: float | None) -> Judge:
    """The judge, each of its calls an error where it takes longer."""

    def limited(prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]) -> Any:
        try:
            return call_within(timeout or 0.0, judge, prompts, a, b)
        except OutOfTime as error:
            raise UserError(f"the judge gives {error}; raise --judge_timeout, or leave it out") from error

    return limited


def _endpoint_judges(
    url: str, model: str | None, criteria: Sequence[str] | None, options: Mapping[str, Any]
) -> dict[str, Judge]:
    if model is None or not criteria:
        raise UserError(
            f"the judge at {url} needs --judge_model, and --judge_criteria with what each group wants, "
            'such as brief="short, plain answers"'
        )
    split = [text.partition("=") for text in criteria]
    for text, (name, _, words) in zip(criteria, split, strict=True):
        if not name or not words:
            raise UserError(f"--judge_criteria takes name=words; {text!r} is not that")
    judges: dict[str, Judge] = {name: EndpointJudge(url, model, words, **options) for name, _, words in split}
    if len(judges) < len(split):
        raise UserError("--judge_criteria names a group twice; give each a name of its own")
    return judges


def _takes_pairs(function: Any, columns: Sequence[str]) -> bool:
    """Whether a callable takes prompts and two lists of responses, and not responses and a column."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    other = len(names) != 3 or names[1] == "completions"
    return not other and (names[2] not in columns or names[1] in columns)


def _answering(judges: PairJudges, prompt: Text) -> PairJudges:
    """Return the judges once each has answered: before thousands of responses are sampled."""
    one, other = (as_completion(text, prompt) for text in "bc")
    judge_pairs(judges.judges, [prompt], [[one]], [[other]], both_orders=False)
    return judges
