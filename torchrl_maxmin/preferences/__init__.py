"""Pairs and users in: schemas, checks, tokenising, and the embedded world."""
