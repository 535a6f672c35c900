"""Fused operators for max-min preference learning; torch and triton only."""
