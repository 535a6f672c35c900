"""Which flag stands under which heading of ``--help``, which are common, and what a flag may be.

Names, types, defaults and words are those of the config dataclasses; tests hold the tables here against them.
"""

from __future__ import annotations

__all__ = ["CHOICES", "COMMON", "EXAMPLES", "GROUPS", "group_of"]

#: headings of ``--help`` in their order, and the flags below each, of all verbs
GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        *("dataset_name", "eval_dataset_name", "dataset_split", "user_column", "prompt_column"),
        *("response_column", "score_column", "chosen_column", "rejected_column", "lower_is_better"),
        *("group_column", "layout", "ties", "tie_margin", "ratings", "max_pairs", "heldout_fraction"),
        *("max_length", "max_prompt_length", "chat_template", "system_prompt", "text_layout"),
        *("completion_only_loss", "describe_columns", "show_user_ids", "world", "num_users"),
        *("pairs_per_user",),
    ),
    "environment": (
        *("env_id", "env_backend", "env_options", "observation", "num_envs", "max_episode_steps"),
        *("frames_per_batch", "total_frames", "shares", "utility_scale", "hidden_sizes", "eval_episodes"),
    ),
    "model": (
        *("model_name_or_path", "pooling", "head", "head_rank", "use_peft", "adapters", "lora_r"),
        *("lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter", "attn_implementation"),
        *("critic", "dtype"),
    ),
    "groups": (
        *("num_groups", "max_groups", "assignment", "num_rounds", "steps_per_round", "num_restarts"),
        *("warm_start_l2", "convergence_tolerance", "use_true_groups", "identifiability", "num_folds"),
        *("num_jackknife", "num_bootstrap", "l2"),
    ),
    "reward": (
        *("reward_model_path", "reward_funcs", "reward_timeout", "share_reward_trunk", "calibration"),
        *("calibration_prompts", "calibration_samples", "baseline_samples", "missing_eos_penalty"),
        "reward_l2",
    ),
    "objective": (
        *("objective", "welfare", "group_weights", "welfare_parameter", "adversary", "tau"),
        *("adversary_step_size", "adversary_step_decay", "adversary_optimistic", "beta", "kl_estimator"),
        *("kl_controller", "kl_target", "kl_horizon", "advantage", "scale_rewards", "num_generations"),
        *("lam", "gamma", "entropy_coeff"),
    ),
    "policies and judge": (
        *("policies", "judge", "judge_model", "judge_criteria", "judge_timeout", "judge_retries"),
        *("judge_retry_after", "judge_refusals", "num_prompts", "num_samples"),
    ),
    "certificate": (
        *("certify", "gap_steps", "stop_at_gap", "certificate_prompts", "certificate_samples"),
        "reward_bound",
    ),
    "sampling": (
        *("response_length", "temperature", "top_k", "top_p", "stop_strings", "rollout_batch_size"),
        *("rollout_engine", "vllm_server_base_url", "vllm_gpu_memory_utilization"),
        *("importance_sampling_cap", "rollout_workers", "rollout_worker_gpus", "ray_address"),
        "max_staleness",
    ),
    "optimisation": (
        *("learning_rate", "head_learning_rate", "critic_learning_rate", "lr_scheduler_type"),
        *("warmup_steps", "warmup_iterations", "max_steps", "num_train_epochs", "num_iterations"),
        *("num_ppo_epochs", "mini_batch_size", "gradient_accumulation_steps", "cliprange"),
        *("cliprange_value", "max_grad_norm", "weight_decay", "optim"),
    ),
    "memory and speed": (
        *("device", "distributed", "per_device_train_batch_size", "generation_batch_size"),
        *("scoring_batch_size", "gradient_checkpointing", "bf16", "tf32", "load_in_4bit"),
        *("feature_cache", "feature_dtype", "num_workers", "fixed_shapes", "stage", "gpus", "memory_gb"),
        *("network_gb_per_s", "network_latency_us"),
    ),
    "logging": (
        *("report_to", "monitor_funcs", "warn_kl_below_zero", "warn_kl", "warn_kl_target", "warn_ratio"),
        *("warn_entropy", "warn_group", "warn_value"),
    ),
    "run": (
        *("output_dir", "seed", "seeds", "recipe", "save_steps", "save_rounds", "save_total_limit"),
        *("stop_at_iteration", "resume_from_checkpoint"),
    ),
}

#: what ``--help`` lists beside the required flags; ``--help-all`` lists all
COMMON = frozenset({
    *("adversary", "beta", "calibration", "critic", "describe_columns", "device", "distributed", "dtype"),
    *("env_id", "env_options", "eval_dataset_name", "gpus", "judge_criteria", "judge_model"),
    *("learning_rate", "lora_r", "max_length", "max_steps", "memory_gb", "model_name_or_path", "num_envs"),
    *("num_groups", "num_iterations", "num_rounds", "num_samples", "num_train_epochs", "num_users"),
    *("objective", "output_dir", "per_device_train_batch_size", "policies", "report_to"),
    *("response_length", "resume_from_checkpoint", "reward_funcs", "reward_model_path", "rollout_batch_size"),
    *("save_steps", "seed", "seeds", "stage", "total_frames", "use_peft", "user_column", "welfare", "world"),
})  # fmt: skip

_WELFARES = (
    *("egalitarian", "utilitarian", "soft_min", "kl_ball", "chi2_ball", "cvar", "generalized_gini", "nash"),
    *("alpha_fair", "fixed"),
)
_LOGGERS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")
_CALIBRATIONS = ("sft_std", "sft_mean", "win_rate", "none")
_DISTRIBUTED = ("none", "ddp", "fsdp2")
_LOADED = {"dtype": ("float32", "bfloat16", "auto"), "distributed": _DISTRIBUTED}
_PAIRS = {
    "ties": ("drop", "halve"),
    "ratings": ("blocks", "pairs"),
    "pooling": ("last", "mean", "cls"),
    "feature_dtype": ("float32", "bfloat16"),
}
_POLICY = {
    "welfare": _WELFARES,
    "adversary": ("entropy_regularized", "exponentiated_gradient", "projected_gradient", "hard_min"),
    "report_to": _LOGGERS,
}

#: the words that a flag may be, by verb; ``ppo --env_id`` is the policy stage's other form
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {
        "world": ("10:1", "80:20"),
        "policies": ("single", "maxmin", "oracle"),
        "report_to": _LOGGERS,
    },
    "sft": {
        **_LOADED,
        "lr_scheduler_type": (
            *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
            *("constant_with_warmup", "inverse_sqrt"),
        ),
        "report_to": _LOGGERS,
    },
    "reward": {
        **_LOADED,
        **_PAIRS,
        "assignment": ("soft", "hard"),
        "head": ("linear", "mlp", "low_rank"),
        "adapters": ("per_group", "shared"),
        "calibration": _CALIBRATIONS,
        "report_to": _LOGGERS,
    },
    "ppo": {
        **_LOADED,
        **_POLICY,
        "objective": ("min_of_means", "mean_of_prompt_mins", "mean_of_mins"),
        "critic": ("adapter", "heads", "full"),
        "advantage": ("gae", "rloo", "grpo"),
        "scale_rewards": ("group", "none"),
        "calibration": _CALIBRATIONS,
        "kl_estimator": ("k1", "k2", "k3"),
        "kl_controller": ("constant", "adaptive"),
        "rollout_engine": ("generate", "hf", "vllm"),
    },
    "ppo --env_id": {
        **_POLICY,
        "objective": ("min_of_means", "mean_of_mins"),
        "env_backend": ("auto", "batched", "gym"),
        "observation": ("auto", "one_hot", "scale", "none"),
        "distributed": ("none", "ddp"),
    },
    "evaluate": {"distributed": _DISTRIBUTED, "judge_refusals": ("error", "tie")},
    "diagnose": _PAIRS,
    "plan": {
        **_LOADED,
        "stage": ("ppo", "sft", "reward"),
        "device": ("cuda", "cpu"),
        "critic": ("adapter", "heads", "full"),
        "advantage": ("gae", "rloo", "grpo"),
        "adapters": ("per_group", "shared"),
    },
}

#: commands at the end of ``--help``
EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": (
        "torchrl-maxmin demo",
        "torchrl-maxmin demo --world 80:20 --seeds 0 1 2 --output_dir runs/milder",
    ),
    "sft": (
        "torchrl-maxmin sft --model_name_or_path gpt2 --dataset_name texts.jsonl --output_dir runs/sft",
        "torchrl-maxmin recipes cp own_pairs_sft",
    ),
    "reward": (
        "torchrl-maxmin reward --model_name_or_path runs/sft --dataset_name pairs.jsonl "
        "--output_dir runs/reward",
        "torchrl-maxmin recipes cp own_pairs_reward",
    ),
    "ppo": (
        "torchrl-maxmin ppo --model_name_or_path runs/sft --reward_model_path runs/reward "
        "--dataset_name prompts.jsonl --output_dir runs/maxmin",
        "torchrl-maxmin ppo --env_id fruit-tree-v0 --output_dir runs/fruit   (ppo --env_id ID --help)",
        "torchrl-maxmin recipes cp own_pairs_ppo",
    ),
    "ppo --env_id": (
        "torchrl-maxmin ppo --env_id fruit-tree-v0 --output_dir runs/fruit",
        "torchrl-maxmin recipes cp environment",
    ),
    "evaluate": (
        "torchrl-maxmin evaluate --policies sft=runs/sft maxmin=runs/maxmin --dataset_name prompts.jsonl "
        "--judge runs/reward --output_dir runs/results",
        "torchrl-maxmin recipes cp endpoint_judge",
    ),
    "diagnose": (
        "torchrl-maxmin diagnose --dataset_name pairs.jsonl --model_name_or_path runs/sft "
        "--output_dir runs/diagnosis",
        "torchrl-maxmin recipes cp diagnose_alone",
    ),
    "plan": (
        "torchrl-maxmin plan --model_name_or_path runs/sft --num_groups 2 --use_peft --gpus 1 --memory_gb 80",
    ),
}


def group_of(name: str) -> str:
    """Return the heading that a flag stands under.

    Args:
        name: the flag, without dashes.

    Raises:
        KeyError: for a flag that stands under none.
    """
    for group, names in GROUPS.items():
        if name in names:
            return group
    raise KeyError(name)
