"""Settings of what samples the responses of rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.settings import ModelSettings, SamplingSettings
from torchrl_maxmin.rollouts.vllm import require_vllm

__all__ = ["ENGINES", "EngineSettings"]

#: what may sample the responses; hf is another name of generate
ENGINES = ("generate", "hf", "vllm")
_TEMPERATURES = (0.01, 2.0)  # vLLM's least, below which it samples at this one, and largest


@dataclass(kw_only=True)
class EngineSettings(ModelSettings, SamplingSettings):
    """What samples the responses of rollouts.

    Args:
        rollout_engine: generate (of Hugging Face; hf is the same) or vllm, in this process or a server. vLLM
            takes the policy's weights before every rollout, and computes one row as the policy does, or the
            run ends. How far the two are apart is logged with every rollout, as
            rollout/log_prob_mismatch_max, _mean and _kl (with top_k or top_p it cannot be told).
        vllm_server_base_url: a vLLM server that serves this run alone, such as http://localhost:8000, in
            place of vLLM in this process; without vLLM here. How to start it: docs/scaling.md.
        vllm_gpu_memory_utilization: part of the device's memory that vLLM may take, beside the training;
            without a GPU, of the machine's.
        importance_sampling_cap: score what was sampled once more before the updates, and weigh each token by
            the ratio of the two probabilities, at most this; for samplers that compute otherwise than the
            trainer (half precision, vLLM). 0 takes the sampler's own log-probabilities. By default 2 with
            rollout_engine vllm, else 0. With top_k or top_p the ratio is the probability that they keep: the
            tokens that they leave out stay unseen.
    """

    rollout_engine: str = "generate"
    vllm_server_base_url: str | None = None
    vllm_gpu_memory_utilization: float = 0.3
    importance_sampling_cap: float | None = None

    @property
    def samples_in_vllm(self) -> bool:
        """Whether an engine beside the trainer samples the responses."""
        return self.rollout_engine == "vllm"

    @property
    def largest_importance_weight(self) -> float:
        """``importance_sampling_cap`` with its default; 0 weighs nothing."""
        if self.importance_sampling_cap is not None:
            return self.importance_sampling_cap
        return 2.0 if self.samples_in_vllm and not self.truncated else 0.0

    def check_engine(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together, or need what is not installed."""
        self.require_known(rollout_engine=ENGINES)
        self.require_at_least(0, "importance_sampling_cap")
        self.require_positive("vllm_gpu_memory_utilization")
        self.require_in_range(0, 1, "vllm_gpu_memory_utilization")
        own_memory = self.vllm_gpu_memory_utilization != EngineSettings.vllm_gpu_memory_utilization
        if not self.samples_in_vllm:
            if own_memory or self.vllm_server_base_url:
                name = "vllm_gpu_memory_utilization" if own_memory else "vllm_server_base_url"
                raise UserError(f"--{name} is of --rollout_engine vllm: leave it out")
            return
        refused = {
            "--load_in_4bit: vLLM takes whole weights": self.load_in_4bit,
            "--distributed: each process would hold an engine": self.distributed != "none",
            "--temperature outside {:g} to {:g}".format(*_TEMPERATURES): not (
                _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1]
            ),
            "--importance_sampling_cap with --top_k or --top_p: how far it is from the trainer cannot be "
            "told from what is left out": bool(self.importance_sampling_cap) and self.truncated,
        }
        for words, given in refused.items():
            if given:
                raise UserError(f"--rollout_engine vllm does not go with {words}; leave one of them out")
        if self.vllm_server_base_url is None:
            require_vllm()
            return
        if own_memory:
            raise UserError("--vllm_gpu_memory_utilization is the server's to say: leave it out")
        if not self.vllm_server_base_url.startswith(("http://", "https://")):
            raise UserError(
                f"--vllm_server_base_url {self.vllm_server_base_url!r} must begin with http:// or https://"
            )
