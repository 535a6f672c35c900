"""Generalised advantage estimation with a vector reward, by steps and by tokens of responses."""

from .naive import token_gae_naive, vector_gae_naive
from .op import token_gae, vector_gae

__all__ = ["token_gae", "token_gae_naive", "vector_gae", "vector_gae_naive"]
