"""What runs in vLLM's worker to take new weights; vLLM imports it by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from torchrl_maxmin.rollouts.weight_link import received

__all__ = ["PolicyWeights"]


class PolicyWeights:
    """Becomes a base class of vLLM's worker (``worker_extension_cls``)."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def describe(self) -> dict[str, Any]:
        """How the server was started, as far as its policy depends on it."""
        model = self.vllm_config.model_config
        return {
            "logprobs_mode": model.logprobs_mode,
            "max_model_len": model.max_model_len,
            "vocab_size": model.get_vocab_size(),
            "data_parallel_size": self.vllm_config.parallel_config.data_parallel_size,
        }

    def receive_policy(self, words: str) -> None:
        """Load weights that the trainer sends; ``words`` are json: its address, how many meet, and what."""
        sent = json.loads(words)
        self.load_policy(received(sent["address"], self.rank + 1, sent["size"], sent["weights"]))

    def load_policy(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load weights in place, by the names of a saved model.

        vLLM's reload does not come back to an output layer that is tied to the embeddings: on a CPU its
        packed copy would stay that of the weights before.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=iter(weights))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
