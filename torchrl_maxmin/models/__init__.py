"""Policy and critic modules around Hugging Face language models."""

from torchrl_maxmin.models.full import TokenCritic
from torchrl_maxmin.models.language import TokenPolicy, TokenScorer
from torchrl_maxmin.models.sequences import predicting_states

__all__ = ["TokenCritic", "TokenPolicy", "TokenScorer", "predicting_states"]
