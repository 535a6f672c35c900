"""The layouts that preference data come in, and the pairs that they give."""
