"""A vLLM server, by its address, as an engine of :mod:`~torchrl_maxmin.rollouts.engine`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.core.http import HttpClient, HttpError
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.rollouts.engine import Sample
from torchrl_maxmin.rollouts.vllm import sampling_options, stop_options
from torchrl_maxmin.rollouts.weight_link import WeightLink, described

__all__ = ["VLLMServer"]

_COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --generation-config vllm "
    "--logprobs-mode processed_logprobs "
    "--worker-extension-cls torchrl_maxmin.rollouts.vllm_worker.PolicyWeights"
)
_SECONDS = 600.0  # for one answer


class VLLMServer:
    """Samples by a vLLM server; weights go to it over a process group of torch. vLLM is needed there alone.

    This starts one, on any machine that reaches the trainer's, with this package installed::

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --generation-config vllm \\
            --logprobs-mode processed_logprobs \\
            --worker-extension-cls torchrl_maxmin.rollouts.vllm_worker.PolicyWeights

    and serves this trainer alone, in a network that may be trusted: who reaches it may call its workers.

    Args:
        policy: says the model, ends, length, and ``stop_strings``.
        base_url: such as ``http://localhost:8000``.
        max_prompt_length: tokens of the longest prompt.
        max_num_seqs: most requests at once.
        top_k, top_p: as of the policy.

    Raises:
        UserError: for a server that does not answer, or was started otherwise.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        base_url: str,
        *,
        max_prompt_length: int,
        max_num_seqs: int = 256,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        self.base_url, self.requests = base_url.rstrip("/"), max_num_seqs
        self.client = HttpClient(_SECONDS)
        self.strings = () if policy.stops is None else policy.stops.strings
        self.options = sampling_options(policy, top_k, top_p)
        try:
            workers = self._call("describe")
        except EngineError as error:
            raise UserError(f"{error}; start it with: {_COMMAND}") from error
        self.size = 1 + len(workers)
        length = max_prompt_length + policy.max_new_tokens
        vocabulary = policy.model.config.get_text_config().vocab_size  # a new pad token's row among it
        faults = {
            "--logprobs-mode processed_logprobs": workers[0]["logprobs_mode"] != "processed_logprobs",
            f"--max-model-len of at least {length}": workers[0]["max_model_len"] < length,
            f"--load-format dummy --hf-overrides '{{\"vocab_size\": {vocabulary}}}'": (
                workers[0]["vocab_size"] != vocabulary
            ),
            "--data-parallel-size 1": workers[0]["data_parallel_size"] > 1,
        }
        if missing := [words for words, fault in faults.items() if fault]:
            raise UserError(f"the vLLM server at {self.base_url} must be started with {' '.join(missing)}")

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, stop_early: bool = True
    ) -> list[Sample]:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        options = self.options | stop_options(self.strings if stop_early else ())

        def sample(prompt: Sequence[int], seed: int) -> Sample:
            (answer,) = self._ask_tokens(prompt, options | {"seed": seed})["choices"]
            steps = answer["logprobs"]["content"]
            return Sample(answer["token_ids"], [step["logprob"] for step in steps])

        with ThreadPoolExecutor(min(self.requests, len(prompts))) as pool:
            jobs = [pool.submit(sample, *row) for row in zip(prompts, seeds, strict=True)]
            try:
                return [job.result() for job in jobs]
            finally:
                pool.shutdown(cancel_futures=True)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        loading: Future[None] = Future()

        def call(words: str) -> None:
            try:
                self._call("receive_policy", words)
                loading.set_result(None)
            except EngineError as error:
                loading.set_exception(error)

        with WeightLink(self._own_address(), self.size) as link:
            words = json.dumps({"address": link.address, "size": self.size, "weights": described(weights)})
            # nothing waits for it at the end: a server whose engine has died may leave it without an answer
            threading.Thread(target=call, args=(words,), daemon=True).start()
            self._wait(loading, link.all_are_there)
            try:
                if not loading.done():
                    link.send(weights.values())
            finally:
                self._wait(loading)
                loading.result()  # where the link breaks, the server knows why
        if not self._ask("reset_prefix_cache", {})["success"]:
            raise EngineError("the cache of prompts could not be emptied")

    def score(self, tokens: Sequence[int]) -> list[float]:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        asked = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        steps = self._ask_tokens(tokens, asked)["prompt_logprobs"]
        return [step[str(token)]["logprob"] for token, step in zip(tokens[1:], steps[1:], strict=True)]

    def _wait(self, loading: Future[None], ready: Callable[[], bool] = lambda: False) -> None:
        """Return once the workers have answered, or are ready; raise where their server is not well."""
        asked = time.monotonic()
        while not (ready() or loading.done()):
            wait([loading], 0.005)
            if time.monotonic() - asked > 1:
                self._ask("health")
                asked = time.monotonic()

    def _ask_tokens(self, tokens: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("inference/v1/generate", {"token_ids": list(tokens), "sampling_params": options})

    def _call(self, method: str, *arguments: str) -> list[Any]:
        """What each of the server's workers answers."""
        return self._ask("collective_rpc", {"method": method, "args": arguments})["results"]

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body).encode()
        # a connection a request: one that was left open may end as it is taken again
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            answer = self.client.request(f"{self.base_url}/{path}", content, headers)
            if 200 <= answer.status < 300:
                return json.loads(answer.body or b"{}")
            detail = f"status {answer.status}: {self.client.shown(answer.body, 300)}"
        except HttpError as error:
            detail = str(error)
        except ValueError:
            detail = f"no JSON, but '{self.client.shown(answer.body, 80)}'"
        raise self._silent(f"/{path} ({detail})")

    def _silent(self, words: str) -> EngineError:
        return EngineError(f"the vLLM server at {self.base_url} does not answer {words}")

    def _own_address(self) -> str:
        """This machine's address as the server may reach it."""
        server = urlsplit(self.base_url)
        port = server.port or (443 if server.scheme == "https" else 80)
        try:
            with socket.create_connection((server.hostname or "", port), timeout=_SECONDS) as link:
                return link.getsockname()[0]
        except OSError as error:
            raise self._silent(f"({error})") from error
