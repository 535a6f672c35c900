"""Samples of policies, and what can be certified from them."""
