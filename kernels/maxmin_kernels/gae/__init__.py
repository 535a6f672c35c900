"""Generalised advantage estimation with a vector reward."""

from .naive import vector_gae_naive
from .op import vector_gae

__all__ = ["vector_gae", "vector_gae_naive"]
