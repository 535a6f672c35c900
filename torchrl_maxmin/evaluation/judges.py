"""Judges: who says which of two responses is better.

A judge is any callable ``f(prompts, a, b) -> probability that a is the better one``, one number in [0, 1]
a comparison, one half for a tie. One judge stands for one group: a ground truth, a reward head, a model
behind an OpenAI-compatible endpoint (hosted, or a local server such as vLLM's), or whatever the user wraps.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from torchrl_maxmin.core.distributed import each_row_once
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import plain_text

__all__ = ["EndpointJudge", "Judge", "Judgements", "judge_pairs", "reward_judge", "truth_judge"]

#: ``f(prompts, a, b)``: the probability that a is better, one a comparison; strings, or lists of messages.
Judge = Callable[[Sequence[Text], Sequence[Text], Sequence[Text]], ArrayLike]

Score = Callable[[Sequence[Text], Sequence[Text]], Any]


def truth_judge(utility: Score) -> Judge:
    """Make a judge that knows the group's utility: 1, 0, or one half for equal utilities.

    Args:
        utility: ``f(prompts, completions)``, one number a completion.

    Example:
        >>> brevity = truth_judge(lambda prompts, completions: [-len(text) for text in completions])
        >>> brevity(["p", "p"], ["short", "same"], ["much longer", "equl"]).tolist()
        [1.0, 0.5]
    """
    return lambda prompts, a, b: np.sign(_margin(utility, prompts, a, b)) / 2 + 0.5


def reward_judge(score: Score, group: int | None = None) -> Judge:
    """Make a judge of a reward head: sigmoid(r(a) - r(b)), the Bradley-Terry probability.

    Args:
        score: ``f(prompts, completions)``, such as ``RewardMixture.score``; [N] or [N, K].
        group: Column of [N, K].

    Example:
        >>> judge = reward_judge(lambda prompts, completions: [[len(text), 0] for text in completions], 0)
        >>> judge(["p"], ["ab"], ["ab"]).tolist()
        [0.5]
    """

    def column(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
        rewards = np.asarray(score(prompts, completions), dtype=np.float64)
        if rewards.ndim == 2 and group is None and rewards.shape[1] > 1:
            raise UserError(f"the rewards have {rewards.shape[1]} columns; say which by group=")
        return rewards[:, group or 0] if rewards.ndim == 2 else rewards

    return lambda prompts, a, b: expit(_margin(column, prompts, a, b))


@dataclass(frozen=True, eq=False)
class Judgements:
    """Judgements of two policies' responses.

    Attributes:
        group_names: The G groups, one judge each.
        wins: Probability that the first policy's response is the better one, both orders averaged, over
            all pairs of responses of a prompt [N, G].
        first_place: How much oftener, over both orders, what was shown first won [G]: 0 for a judge
            without position bias, 1 for one that always takes the first; NaN where one order was asked.
    """

    group_names: tuple[str, ...]
    wins: np.ndarray
    first_place: np.ndarray


def judge_pairs(
    judges: Mapping[str, Judge],
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Text]],
    others: Sequence[Sequence[Text]],
    *,
    both_orders: bool = True,
) -> Judgements:
    """Ask every group's judge for every pair of two policies' responses to the same prompt.

    Args:
        judges: Group name -> judge. Groups of one population may share a judge only by sharing a taste.
        prompts: N prompts.
        responses: The policy's M responses to each prompt [N][M].
        others: The other policy's responses [N][M'].
        both_orders: Ask (a, b) and (b, a) and average: language models favour a place. Costs twice.

    Returns:
        :class:`Judgements`; ``wins`` goes to :func:`~torchrl_maxmin.stats.rates.rates_by_group`.

    Raises:
        UserError: If lengths disagree, a prompt has no response, or a judge gives no probability for
            every comparison.

    Example:
        >>> judges = {"brief": truth_judge(lambda prompts, texts: [-len(text) for text in texts])}
        >>> judge_pairs(judges, ["p"], [["a", "abc"]], [["ab"]]).wins
        array([[0.5]])
    """
    if not judges:
        raise UserError("no judge; give one a group, such as {'group 0': judge}")
    counts = (len(prompts), len(responses), len(others))
    if len(set(counts)) != 1 or not prompts:
        raise UserError(f"{counts[0]} prompts, {counts[1]} and {counts[2]} lists of responses; give one each")
    if any(len(texts) == 0 for texts in (*responses, *others)):
        raise UserError("a prompt has no responses; leave it out of both policies")
    asked = [(n, *sides) for n in range(len(prompts)) for sides in product(responses[n], others[n])]
    rows, first, second = (list(column) for column in zip(*asked, strict=True))
    repeated = [prompts[n] for n in rows]
    per_prompt = np.bincount(rows, minlength=len(prompts))
    wins, place = [], []
    for name, judge in judges.items():
        forward = _ask(name, judge, repeated, first, second)
        probability, bias = forward, np.nan
        if both_orders:
            backward = _ask(name, judge, repeated, second, first)
            probability = (forward + 1 - backward) / 2
            bias = float((forward + backward).mean() - 1)
        wins.append(np.bincount(rows, probability, len(prompts)) / per_prompt)
        place.append(bias)
    return Judgements(tuple(judges), np.stack(wins, axis=1), np.array(place))


def _ask(
    name: str, judge: Judge, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]
) -> np.ndarray:
    def answers(rows: slice) -> np.ndarray:
        return _answers(name, judge, prompts[rows], a[rows], b[rows])

    return np.concatenate(each_row_once(answers, len(prompts)))


def _answers(
    name: str, judge: Judge, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]
) -> np.ndarray:
    try:
        answer = np.asarray(judge(prompts, a, b), dtype=np.float64)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the judge of {name!r} fails on f(prompts, a, b) with {type(error).__name__}: {error}"
        ) from error
    if answer.shape != (len(prompts),):
        raise UserError(
            f"the judge of {name!r} gives {list(answer.shape)} for {len(prompts)} comparisons; it must give "
            "one probability each"
        )
    if not np.isfinite(answer).all() or answer.min() < 0 or answer.max() > 1:
        raise UserError(
            f"the judge of {name!r} gives a number outside [0, 1]; it must give the probability that the "
            "first response is better, one half for a tie (reward_judge makes one of rewards)"
        )
    return answer


def _margin(score: Score, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]) -> np.ndarray:
    return np.asarray(score(prompts, a), dtype=np.float64) - np.asarray(score(prompts, b), dtype=np.float64)


_TEMPLATE = """You compare two responses to the same prompt for a reader who wants this: {criterion}

Prompt:
{prompt}

Response A:
{a}

Response B:
{b}

Which response does this reader prefer? Answer with one word: A, B or TIE."""

_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)


class _TryAgain(Exception):
    """A failure that the next attempt may mend."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class EndpointJudge:
    """A judge (``f(prompts, a, b)``) that asks a chat model, one request a comparison.

    The endpoint is anything that answers ``POST {base_url}/chat/completions`` as OpenAI's does. The model
    is told what the group wants and answers A, B or TIE. Timeouts, broken connections, status 429 and 5xx
    and answers that cannot be read are tried again; what fails to the end is one error.

    Attributes:
        base_url: such as ``http://localhost:8000/v1``.
        model: name that the endpoint knows.
        criterion: what the group wants, in words; the groups' judges differ in this.
        api_key_variable: environment variable that holds the key; without it no key is sent.
        timeout: seconds for one request.
        retries: further attempts after a failed one.
        backoff: seconds before the second attempt, doubled each time; a ``Retry-After`` is heeded.
        workers: requests at a time.
        temperature: of the judge.
        template: the question, with {criterion}, {prompt}, {a} and {b}.

    Example:
        >>> judge = EndpointJudge("http://localhost:8000/v1", "my-judge", "short and plain answers")
        >>> judge.url
        'http://localhost:8000/v1/chat/completions'
    """

    base_url: str
    model: str
    criterion: str
    api_key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    workers: int = 8
    temperature: float = 0.0
    template: str = _TEMPLATE

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url {self.base_url!r} must begin with http:// or https://")
        if self.timeout <= 0 or self.retries < 0 or self.workers < 1:
            raise UserError("timeout must be positive, retries at least 0 and workers at least 1")
        if missing := [name for name in ("{prompt}", "{a}", "{b}") if name not in self.template]:
            raise UserError(f"the template lacks {', '.join(missing)}")

    @property
    def url(self) -> str:
        """Address of the requests."""
        return self.base_url.rstrip("/") + "/chat/completions"

    def __call__(self, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]) -> np.ndarray:
        """Probability [N] that ``a`` is the better response: 1, 0 or one half.

        The question holds a conversation as its transcript.

        Raises:
            UserError: for a request that fails to the end; the first one stops the rest.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = [pool.submit(self._compare, *texts) for texts in zip(prompts, a, b, strict=True)]
            try:
                return np.array([job.result() for job in jobs], dtype=np.float64)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _compare(self, prompt: Text, a: Text, b: Text) -> float:
        texts = {"prompt": plain_text(prompt), "a": plain_text(a), "b": plain_text(b)}
        texts["criterion"] = self.criterion
        # Texts may hold braces: one pass over the template, and never format.
        question = re.sub(r"\{(criterion|prompt|a|b)\}", lambda found: texts[found[1]], self.template)
        for attempt in range(self.retries + 1):
            try:
                return _verdict(self._request(question))
            except _TryAgain as error:
                if attempt == self.retries:
                    tries = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"
                    raise UserError(
                        f"the judge at {self.url} gave no verdict in {tries}: {error}; see that the endpoint "
                        "runs and answers A, B or TIE, or raise timeout or retries"
                    ) from error
                time.sleep(max(self.backoff * 2**attempt, error.wait))
        raise AssertionError("unreachable")

    def _request(self, question: str) -> bytes:
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "temperature": self.temperature}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace").strip() or error.reason
            if error.code in _TRANSIENT:
                after = error.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else 0.0
                raise _TryAgain(f"status {error.code} ({detail})", wait) from error
            raise UserError(
                f"the judge at {self.url} refuses with status {error.code} ({detail}); see the "
                f"model's name {self.model!r}, the address and the key in ${self.api_key_variable}"
            ) from error
        except (http.client.HTTPException, OSError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise _TryAgain(f"no answer within {self.timeout:g} s") from error
            raise _TryAgain(f"{type(error).__name__}: {error}" if cause is error else str(cause)) from error


def _verdict(answer: bytes) -> float:
    """1, 0 or one half from the body of an answer."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        start = answer[:80].decode(errors="replace")
        raise _TryAgain(f"the answer is no chat completion but {start!r}") from error
    words = str(content).replace("*", " ").replace(".", " ").upper().split()
    if len(words) == 1 and words[0] in _VERDICTS:
        return _VERDICTS[words[0]]
    raise _TryAgain(f"the verdict is {str(content)[:80]!r}")
