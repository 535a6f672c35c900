"""Tables in, and their columns."""
