"""The stages: supervised fine-tuning, reward mixture, policy."""
