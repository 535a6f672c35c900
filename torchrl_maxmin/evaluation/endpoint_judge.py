"""A judge behind an OpenAI-compatible endpoint: hosted, or a local server such as vLLM's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.http import HttpClient, HttpError, RedirectError, seconds_to_wait
from torchrl_maxmin.core.progress import console, late_bar
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import plain_text

__all__ = ["EndpointJudge"]

_TEMPLATE = """You compare two responses to the same prompt for a reader who wants this: {criterion}

Prompt:
{prompt}

Response A:
{a}

Response B:
{b}

Which response does this reader prefer? Answer with one word: A, B or TIE."""

_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_AROUND = str.maketrans(dict.fromkeys("*_`.,:;!'\"()[]", " "))  # what models put around a word
_TRANSIENT = (408, 409, 425, 429)  # and all from 500
_OF_ONE = (400, 413, 422)  # may be of one comparison alone: too long for the model, a content filter


class _TryAgain(Exception):
    """A failure that the next attempt may mend."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Refusal(Exception):
    """A failure that stays, in the words of what the endpoint does."""


class _RefusalOfOne(_Refusal):
    """A failure that may be of this comparison alone."""


@dataclass(frozen=True)
class EndpointJudge:
    """A judge (``f(prompts, a, b)``) that asks a chat model, one request a comparison.

    The endpoint is anything that answers ``POST {base_url}/chat/completions`` as OpenAI's does. The model
    is told what the group wants and answers A, B or TIE, after ``<think>...</think>`` if it likes. Timeouts,
    broken connections, status 429 and 5xx and answers that cannot be read are tried again; what fails to the
    end is one error, before which the requests on their way are waited for. Nothing is asked twice: neither
    a question that comes again, nor one whose verdict :attr:`verdicts` holds. Redirects are not followed.

    Attributes:
        base_url: such as ``http://localhost:8000/v1``; without a key.
        model: name that the endpoint knows.
        criterion: what the group wants, in words; the groups' judges differ in this.
        api_key_variable: environment variable that holds the key; without it no key is sent.
        timeout: seconds for one request, to the end of its answer.
        retries: further attempts after a failed one.
        backoff: seconds before the second attempt, doubled each time; a ``Retry-After`` is heeded.
        retry_after: most seconds that a ``Retry-After`` is heeded.
        workers: requests at a time.
        temperature: of the judge.
        template: the question, with {criterion}, {prompt}, {a} and {b}.
        refusals: ``error``, or ``tie``: what it is where the endpoint refuses one comparison (status 400,
            413 or 422), which may be too long for the model or caught by a filter.
        verdicts: those that were had, by what identifies a question; a mapping that keeps them, such as
            :class:`~torchrl_maxmin.evaluation.cache.Verdicts`, lets a later judge go on from there.

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
    retry_after: float = 60.0
    workers: int = 8
    temperature: float = 0.0
    template: str = _TEMPLATE
    refusals: str = "error"
    verdicts: MutableMapping[str, float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url {self.base_url!r} must begin with http:// or https://")
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"base_url at {parts.hostname} holds more than host and path; a key goes into "
                f"${self.api_key_variable}, which no file and no message shows"
            )
        if not (self.timeout > 0 and self.retries >= 0 and self.workers >= 1 and self.retry_after >= 0):
            raise UserError(
                "timeout must be positive, retries and retry_after at least 0 and workers at least 1"
            )
        if self.refusals not in ("error", "tie"):
            raise UserError(f"refusals {self.refusals!r} is none of error, tie")
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
            UserError: for a request that fails to the end; no further one is begun then.
        """
        questions = [self._question(*texts) for texts in zip(prompts, a, b, strict=True)]
        keys = [self._identity(question) for question in questions]
        places: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key not in self.verdicts:
                places.setdefault(key, place)
        ties = self._ask({key: questions[place] for key, place in places.items()}, places, len(keys))
        return np.array([0.5 if key in ties else self.verdicts[key] for key in keys], dtype=np.float64)

    def _question(self, prompt: Text, a: Text, b: Text) -> str:
        texts = {"prompt": plain_text(prompt), "a": plain_text(a), "b": plain_text(b)}
        texts["criterion"] = self.criterion
        # Texts may hold braces: one pass over the template, and never format.
        return re.sub(r"\{(criterion|prompt|a|b)\}", lambda found: texts[found[1]], self.template)

    def _identity(self, question: str) -> str:
        """What a verdict depends on; template and criterion are in the question."""
        parts = json.dumps([self.url, self.model, self.temperature, question])
        return hashlib.sha256(parts.encode()).hexdigest()

    def _ask(self, questions: dict[str, str], places: dict[str, int], total: int) -> set[str]:
        """Get a verdict on each question; returns the keys of those that were refused and count as ties."""
        if not questions:
            return set()
        secret = self._secret()
        ties: dict[str, BaseException] = {}
        failures: dict[str, BaseException] = {}
        with (
            ThreadPoolExecutor(self.workers) as pool,
            HttpClient(self.timeout, [secret]) as client,
            late_bar("asking the judge", len(questions)) as reach,
        ):
            asking = _Asking(self, client, secret)
            jobs = {pool.submit(asking.verdict, question): key for key, question in questions.items()}
            try:
                for done, job in enumerate(as_completed(jobs), 1):
                    key, error = jobs[job], job.exception()
                    if isinstance(error, _RefusalOfOne) and self.refusals == "tie":
                        ties[key] = error
                    elif isinstance(error, _Refusal | _TryAgain):
                        failures[key] = error
                    elif (verdict := job.result()) is not None:
                        self.verdicts[key] = verdict
                    reach(done)
            finally:
                asking.end.set()
        if not self.verdicts:  # what refuses everything refuses no single one
            failures |= ties
        for key, error in failures.items():
            raise self._error(f"call {places[key] + 1} of {total}", error) from error
        if ties:
            line = f"the judge at {self.url} refused {len(ties)} of {total} comparisons: they count as ties"
            console.print(line, markup=False, soft_wrap=True)
        return set(ties)

    def _secret(self) -> str:
        secret = os.environ.get(self.api_key_variable, "").strip()
        if not all("!" <= character <= "~" for character in secret):
            raise UserError(f"the key in ${self.api_key_variable} holds characters that no key has; mend it")
        return secret

    def _error(self, call: str, error: BaseException) -> UserError:
        where = f"{call}: the judge at {self.url}"
        if isinstance(error, _TryAgain):
            tries = "1 attempt" if self.retries == 0 else f"{self.retries + 1} attempts"
            return UserError(
                f"{where} gave no verdict in {tries}: {error}; see that the endpoint runs and answers A, B "
                "or TIE, or raise timeout or retries (--judge_timeout, --judge_retries)"
            )
        way = f"see the model's name {self.model!r}, the address and the key in ${self.api_key_variable}"
        if isinstance(error, _RefusalOfOne):
            way += "; where it is of this comparison alone, refusals tie (--judge_refusals tie) goes on"
        return UserError(f"{where} {error}; {way}")


class _Asking:
    """The requests of one call of a judge, from several threads.

    Attributes:
        end: set where no further request is to begin.
    """

    def __init__(self, judge: EndpointJudge, client: HttpClient, secret: str):
        self.judge, self.client = judge, client
        self.headers = {"Content-Type": "application/json"}
        if secret:
            self.headers["Authorization"] = f"Bearer {secret}"
        self.end, self._told = threading.Event(), threading.Event()

    def verdict(self, question: str) -> float | None:
        """The verdict on a question; None where the end came before it was had."""
        for attempt in range(self.judge.retries + 1):
            if self.end.is_set():
                return None
            try:
                return self._verdict(self._completion(question))
            except _Refusal as error:
                if not (isinstance(error, _RefusalOfOne) and self.judge.refusals == "tie"):
                    self.end.set()  # at once, not when the main thread hears of it
                raise
            except _TryAgain as error:
                if attempt == self.judge.retries:
                    self.end.set()
                    raise
                self.end.wait(max(self.judge.backoff * 2**attempt, self._wait(error.wait)))
        raise AssertionError("unreachable")

    def _wait(self, asked: float) -> float:
        """The seconds to wait of those that the endpoint asks for; said where it asks for more."""
        most = self.judge.retry_after
        if asked > most and not self._told.is_set():
            self._told.set()
            line = (
                f"the judge at {self.judge.url} asks to wait {asked:.0f} s, and is asked again after "
                f"{most:g} s (retry_after, --judge_retry_after)"
            )
            console.print(line, markup=False, soft_wrap=True)
        return min(asked, most)

    def _completion(self, question: str) -> bytes:
        messages = [{"role": "user", "content": question}]
        asked = {"model": self.judge.model, "messages": messages, "temperature": self.judge.temperature}
        try:
            answer = self.client.request(self.judge.url, json.dumps(asked).encode(), self.headers)
        except RedirectError as error:
            raise _Refusal(str(error)) from error
        except HttpError as error:
            raise _TryAgain(str(error)) from error
        if 200 <= answer.status < 300:
            return answer.body
        said = self.client.shown(answer.body)
        reason = f"status {answer.status} ({said})" if said else f"status {answer.status}"
        if answer.status in _TRANSIENT or answer.status >= 500:
            raise _TryAgain(reason, seconds_to_wait(answer.headers.get("retry-after", "")))
        raise (_RefusalOfOne if answer.status in _OF_ONE else _Refusal)(f"refuses with {reason}")

    def _verdict(self, body: bytes) -> float:
        """1, 0 or one half from the body of an answer."""
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise _TryAgain(
                f"the answer is no chat completion but '{self.client.shown(body, 80)}'"
            ) from error
        said = _without_thoughts(content)
        words = said.translate(_AROUND).upper().split()
        if len(words) == 1 and words[0] in _VERDICTS:
            return _VERDICTS[words[0]]
        raise _TryAgain(f"the verdict is '{self.client.shown(said, 80)}'")


def _without_thoughts(content: Any) -> str:
    """The text of a message behind what a reasoning model thought; templates may have opened the thought."""
    if isinstance(content, list):  # parts, of which thoughts have types of their own
        texts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text", "")) for part in texts)
    return str(content).rpartition("</think>")[2]
