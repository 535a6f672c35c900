"""Supervised fine-tuning: the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchrl_maxmin.core.distributed import across_ranks, is_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import require_finite_parameters
from torchrl_maxmin.core.run import resolve_device, seed_everything, write_json
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.core.settings import ReportSettings
from torchrl_maxmin.models.checkpointing import checkpoint_layers
from torchrl_maxmin.models.loading import (
    ensure_pad_token,
    load_causal_lm,
    load_tokenizer,
    plain_generation,
    require_causal_lm,
)
from torchrl_maxmin.models.lora import add_adapters, save_policy
from torchrl_maxmin.models.sequences import max_positions, pad_right
from torchrl_maxmin.models.settings import ModelSettings
from torchrl_maxmin.preferences import load_table
from torchrl_maxmin.preferences.chat import ChatSettings, Text, is_conversational, speaker_of, split_prompt
from torchrl_maxmin.preferences.io.files import mixed_columns, require_columns
from torchrl_maxmin.preferences.texts import TextEncoder, cut_start, read_texts
from torchrl_maxmin.stats.interval import SCHEMA_VERSION
from torchrl_maxmin.trainers.sft_steps import train_language_model

__all__ = ["SFTConfig", "run_sft"]

#: the schedules of transformers that need no options of their own
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass
class SFTConfig(ModelSettings, ChatSettings, ReportSettings):
    """Supervised fine-tuning of a causal language model.

    Args:
        model_name_or_path: Hugging Face model folder or hub name.
        dataset_name: json, jsonl, csv or parquet file, saved dataset or hub name, with columns
            prompt and completion, or text, or prompt and chosen, or messages; texts are strings or lists of
            messages.
        output_dir: folder for the model; must be empty or absent.
        dataset_split: split to train on.
        max_steps: optimizer steps; -1 trains num_train_epochs.
        num_train_epochs: passes over the data when max_steps is -1.
        per_device_train_batch_size: rows in memory at once.
        gradient_accumulation_steps: so many times as many rows an optimizer step, of which every token counts
            alike.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: linear, cosine, cosine_with_restarts, polynomial, constant,
            constant_with_warmup or inverse_sqrt.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW weight decay.
        max_length: longest text in tokens; longer ones lose their start, but for BOS.
        completion_only_loss: leave the prompt's tokens out of the loss.
        save_steps: write a checkpoint every so many optimizer steps; 0 writes none, but where Ctrl-C or
            SIGTERM ends the run.
        save_total_limit: checkpoints that stay, the latest ones; 0 keeps all.
        resume_from_checkpoint: go on with the run in output_dir, from its last checkpoint that is whole (or
            from the start where there is none) by last, or from the one whose folder is named.
        merge_adapter: save a plain model, its adapter added to the weights; false saves the adapter alone.
        seed: seed of everything random.
        device: cpu, cuda or auto.
    """

    model_name_or_path: str
    dataset_name: str
    output_dir: str
    dataset_split: str = "train"
    max_steps: int = -1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_length: int = 1024
    completion_only_loss: bool = False
    optim: str = field(default="adamw_torch_fused", kw_only=True)  # as of the Trainer
    save_steps: int = 0
    save_total_limit: int = 0
    resume_from_checkpoint: str | None = None
    merge_adapter: bool = True
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        self.check_model()
        self.check_report()
        self.require_seed()
        self.require_known(lr_scheduler_type=SCHEDULES)
        self.require_at_least(1, "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
        self.require_at_least(
            0, "learning_rate", "warmup_steps", "weight_decay", "save_steps", "save_total_limit"
        )
        self.require_positive("num_train_epochs")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError("--max_steps must be at least 1, or -1 to train --num_train_epochs")


def _read_texts(config: SFTConfig) -> tuple[list[Text], list[Text]]:
    """Prompts and completions of all rows; a plain text is a completion without prompt."""
    table = load_table(config.dataset_name, config.dataset_split)
    names = {*table.column_names, *mixed_columns(table)}
    pairs = (("prompt", "completion"), ("", "text"), ("prompt", "chosen"), ("", "messages"))
    for columns in pairs:
        wanted = [name for name in columns if name]
        if names.issuperset(wanted):
            require_columns(table, wanted, "sft")
            *prompts, completions = (read_texts(table, name) for name in wanted)
            opened = prompts[0] if prompts else [None] * len(completions)
            if not completions:
                break
            rows = zip(opened, completions, strict=True)
            split = [_split_row(*texts, row, wanted[-1]) for row, texts in enumerate(rows)]
            return [start for start, _ in split], [end for _, end in split]
    if len(table) == 0:
        raise UserError(f"{config.dataset_name} has no rows to train on")
    raise UserError(
        "sft needs columns prompt and completion, or text, or prompt and chosen, or messages; found "
        f"{', '.join(table.column_names)}"
    )


def _split_row(prompt: Text | None, text: Text, row: int, column: str) -> tuple[Text, Text]:
    """A row's prompt and completion; the last turn of a conversation answers those before it."""
    if prompt is None:
        if isinstance(text, str):
            return "", text
        if speaker_of(text[-1]) != "Assistant" or all(speaker_of(turn) == "Assistant" for turn in text):
            raise UserError(
                f"row {row}: column {column!r} holds a conversation that does not end with an answer of the "
                "assistant to a message before it; mend the row, or give a string"
            )
        first = len(text) - 1
        while (
            first and speaker_of(text[first - 1]) == "Assistant"
        ):  # a whole turn, which nothing goes on with
            first -= 1
        prompt, text = text[:first], text[first:]
    start, (end,) = split_prompt(prompt, [text], row, [column])
    return start, end


def _encode(
    tokenizer: Any, prompts: Sequence[Text], completions: Sequence[Text], config: SFTConfig
) -> list[dict[str, Any]]:
    """Token rows, and how many tokens at the start of each are not trained on."""
    encoder = TextEncoder(tokenizer)
    starts = encoder.prompts(prompts, answerable=False)
    ends = encoder.completions(prompts, completions)
    rows = []
    for start, end in zip(starts, ends, strict=True):
        ids = cut_start([*start, *end], config.max_length, tokenizer.bos_token_id)
        bos = start[:1] == ids[:1] == [tokenizer.bos_token_id]  # stays where the whole prompt was cut off
        skip = max(len(ids) - len(end), int(bos)) if config.completion_only_loss else 0
        rows.append({"input_ids": ids, "skip": skip})
    return rows


@across_ranks
@stage("sft", inputs=("model_name_or_path", "dataset_name"), may_change=("merge_adapter",))
def run_sft(config: SFTConfig) -> Path:
    """Fine-tune a model and save it with its tokenizer; returns the folder.

    Raises:
        UserError: before any work, for a model, data set or folder that cannot be used.
        FloatingPointError: for a loss or weights that are NaN or infinite, which are not saved.
    """
    config.check()
    device = resolve_device(config.device)
    require_causal_lm(config.model_name_or_path)
    tokenizer = config.apply_chat(load_tokenizer(config.model_name_or_path))
    prompts, completions = _read_texts(config)
    folder = Path(config.output_dir)
    seed_everything(config.seed)
    model = load_causal_lm(config.model_name_or_path, **config.load_options())
    if model.dtype.itemsize < 4 and not config.use_peft:
        raise UserError(
            "sft would train weights in half precision, which loses small steps; give --dtype float32 with "
            "--bf16, or --use_peft"
        )
    ensure_pad_token(tokenizer, model)
    if any(map(is_conversational, completions)) and (turn_end := TextEncoder(tokenizer).turn_end) is not None:
        plain_generation(model, [tokenizer.eos_token_id, turn_end])  # what it is taught to end with ends it
    rows = _encode(tokenizer, prompts, completions, config)
    longest, positions = max(len(row["input_ids"]) for row in rows), max_positions(model)
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest text has {longest} tokens, more than the model's {positions} positions; "
            f"give --max_length {positions} or less to cut it"
        )

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens, mask = pad_right([row["input_ids"] for row in batch], tokenizer.pad_token_id)
        skip = torch.tensor([row["skip"] for row in batch])
        scored = mask & (torch.arange(tokens.shape[1]) >= skip[:, None])
        return {
            "input_ids": tokens,
            "attention_mask": mask.long(),
            "labels": tokens.masked_fill(~scored, -100),
        }

    adapted = None
    if config.use_peft:
        adapted = add_adapters(model, ["default"], config.lora_settings(), task_type="CAUSAL_LM")
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    trained = model if adapted is None else adapted
    loss = train_language_model(config, trained, rows, collate, device)
    require_finite_parameters(trained.named_parameters(), "the model")
    save_policy(model, adapted, folder, merge=config.merge_adapter)
    if is_main_process():
        tokenizer.save_pretrained(folder)
    write_json(
        folder / "summary.json", {"schema_version": SCHEMA_VERSION, "rows": len(rows), "train_loss": loss}
    )
    return folder
