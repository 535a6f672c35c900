"""What runs in vLLM's worker to take new weights; vLLM imports it by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["PolicyWeights"]


class PolicyWeights:
    """Becomes a base class of vLLM's worker (``worker_extension_cls``)."""

    model_runner: Any

    def load_policy(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Load weights in place, by the names of a saved model.

        vLLM's reload does not come back to an output layer that is tied to the embeddings: on a CPU its
        packed copy would stay that of the weights before.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=iter(weights))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
