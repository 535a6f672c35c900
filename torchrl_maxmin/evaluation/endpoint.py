"""A judge behind an OpenAI-compatible endpoint: a hosted model, or a local server such as vLLM's."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
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
        missing = [name for name in ("{prompt}", "{a}", "{b}") if name not in self.template]
        if missing:
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
        texts = {"criterion": self.criterion}
        texts |= {name: plain_text(text) for name, text in (("prompt", prompt), ("a", a), ("b", b))}
        # Texts may hold braces: one pass over the template, and never format.
        question = re.sub(r"\{(criterion|prompt|a|b)\}", lambda found: texts[found[1]], self.template)
        wait = self.backoff
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
                time.sleep(max(wait, error.wait))
                wait *= 2
        raise AssertionError("unreachable")

    def _request(self, question: str) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
        }
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
        except TimeoutError as error:
            raise _TryAgain(f"no answer within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _TryAgain(f"no answer within {self.timeout:g} s") from error
            raise _TryAgain(str(error.reason)) from error
        except (http.client.HTTPException, OSError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error


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
