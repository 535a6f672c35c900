"""Where the data of a training run come from: sampled responses with their rewards, or an environment."""
