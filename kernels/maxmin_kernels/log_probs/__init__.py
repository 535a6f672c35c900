"""Log-probability of the taken token and entropy, straight from hidden states."""

from .naive import token_log_probs_naive
from .op import token_log_probs

__all__ = ["token_log_probs", "token_log_probs_naive"]
