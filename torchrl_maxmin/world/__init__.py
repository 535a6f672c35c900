"""The embedded world: two tastes in film reviews, and people who label pairs by them."""

from torchrl_maxmin.world.world import (
    World,
    build_config,
    build_tokenizer,
    is_heldout,
    sample_prompts,
    sample_reviews,
)

__all__ = ["World", "build_config", "build_tokenizer", "is_heldout", "sample_prompts", "sample_reviews"]
