"""Hugging Face models and tokenizers in, with one clear error where they cannot be had."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run_folder import require_finished
from torchrl_maxmin.models.integrity import (
    damaged_file,
    listed,
    require_all_weights,
    require_whole_adapter,
)
from torchrl_maxmin.models.sequences import text_config

__all__ = [
    "OWN_PAD",
    "adapted_model",
    "end_tokens",
    "ensure_pad_token",
    "import_peft",
    "import_transformers",
    "is_encoder",
    "load_causal_lm",
    "load_classifier",
    "load_config",
    "load_tokenizer",
    "load_trunk",
    "load_whole",
    "plain_generation",
    "quiet_peft",
    "reading",
    "require_causal_lm",
    "require_model",
    "require_trunk",
    "same_vocabulary",
    "saved_ends",
    "set_pad_token",
]


#: the pad token of those that had none; no text holds it
OWN_PAD = "<|pad|>"


def import_transformers() -> Any:
    """The transformers package, quiet; raises :class:`UserError` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("language models need transformers: pip install 'torchrl-maxmin[llm]'") from error
    # its load reports and bars would tear ours apart
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def import_peft() -> Any:
    """The peft package; raises :class:`UserError` where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install 'torchrl-maxmin[llm]'") from error
    return peft


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft calls transformers by a name of its past."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def reading(what: str, name_or_path: str) -> Iterator[None]:
    """Whatever a library says of files that it cannot read, as one :class:`UserError`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "no more is known")
        file = damaged_file(name_or_path)
        raise UserError(
            f"cannot read the {what} of {name_or_path} ({type(error).__name__}: {said}); "
            + (f"{file} is damaged: " if file else "if files are missing or damaged, ")
            + "save or download it again"
        ) from error


def load_config(name_or_path: str) -> Any:
    """The config of a model.

    Raises:
        UserError: unless ``name_or_path`` holds, or can fetch, one.
    """
    require_finished(name_or_path)
    name_or_path = adapted_model(name_or_path) or name_or_path
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name_or_path} is a folder without config.json: give one that save_pretrained() wrote"
        )
    transformers = import_transformers()  # not in the try: that it is missing is another error
    if folder.is_dir():
        with reading("config", name_or_path):
            return transformers.AutoConfig.from_pretrained(name_or_path)
    try:
        return transformers.AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no model at {name_or_path!r}: it is neither a local folder nor a hub name that can be reached; "
            "check --model_name_or_path"
        ) from error


def adapted_model(name_or_path: str) -> str | None:
    """The model that a folder of one LoRA adapter names as its own; None for any other folder or name."""
    folder = Path(name_or_path)
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    with reading("adapter_config.json", name_or_path):
        return json.loads(path.read_text())["base_model_name_or_path"]


def require_model(name_or_path: str) -> None:
    """Raise :class:`UserError` unless ``name_or_path`` holds, or can fetch, a model's config."""
    load_config(name_or_path)


def require_causal_lm(name_or_path: str) -> Any:
    """The config of a causal language model, read before any weights.

    Raises:
        UserError: if there is no such model, or it is an encoder, an encoder-decoder or none that answers.
    """
    config = load_config(name_or_path)
    wanted = "a policy is a causal language model (GPT-2, Llama, Qwen, Gemma ...)"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name_or_path} is an encoder-decoder ({config.model_type}); {wanted}")
    if is_encoder(config):
        raise UserError(
            f"{name_or_path} is an encoder ({config.model_type}), which reads in both directions and cannot "
            f"answer; {wanted}"
        )
    if type(config) not in import_transformers().MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"transformers knows no causal language model of type {config.model_type}; {wanted}")
    return config


def require_trunk(name_or_path: str) -> Any:
    """The config of a model whose hidden states can be read as one vector a text, before any weights.

    Raises:
        UserError: if there is no such model, or it is an encoder-decoder.
    """
    config = load_config(name_or_path)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name_or_path} is an encoder-decoder ({config.model_type}); rewards are read from a decoder or "
            "an encoder alone"
        )
    return config


def load_tokenizer(name_or_path: str) -> Any:
    """Load a tokenizer; prompts are padded left, responses right, by this package itself."""
    require_model(name_or_path)
    with reading("tokenizer", name_or_path):
        return import_transformers().AutoTokenizer.from_pretrained(name_or_path)


def end_tokens(model: Any, first: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Every token that ends a response: those given, then the model's own, each once.

    A chat model often has several: the end of a turn and the end of a text.

    Args:
        model: a Hugging Face model; its ``generation_config`` and its config are asked, and ids
            that its vocabulary does not hold are left out of their answers.
        first: ids that come before the model's own, and are kept as they are.
    """
    configs = (getattr(model, "generation_config", None), model.config, text_config(model))
    return _ends(configs, model.get_input_embeddings().num_embeddings, first)


def saved_ends(name_or_path: str) -> tuple[int, ...]:
    """Every token that ends a response of a saved causal language model, read without its weights."""
    config = load_config(name_or_path)
    try:
        generation = import_transformers().GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # there is none: the model itself is loaded without, too
        generation = None
    return _ends((generation, config, text_config(config)), text_config(config).vocab_size)


def _ends(
    configs: Iterable[Any], num_tokens: int, first: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    given = [first] if isinstance(first, int) else list(first or ())
    for config in configs:
        own = getattr(config, "eos_token_id", None)
        own = [own] if isinstance(own, int) else (own or ())
        given += [token for token in own if 0 <= token < num_tokens]
    return tuple(dict.fromkeys(given))


def set_pad_token(tokenizer: Any, ends: Iterable[int]) -> None:
    """Give a tokenizer without a pad token, or with one that ends a text, :data:`OWN_PAD`.

    Args:
        tokenizer: changed in place.
        ends: tokens that may end a text, beside the tokenizer's EOS.

    Raises:
        UserError: for a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, so a response has no end; set one and save it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in {tokenizer.eos_token_id, *ends}:
        tokenizer.add_special_tokens({"pad_token": OWN_PAD})


def ensure_pad_token(tokenizer: Any, model: nn.Module) -> None:
    """Give tokenizer and model a pad token that is not the end of a text.

    With ``pad == eos`` a policy is never trained to stop and a Hugging Face classifier reads
    its score at the wrong place.
    """
    set_pad_token(tokenizer, end_tokens(model))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = text_config(model).pad_token_id = tokenizer.pad_token_id


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers have one id for every token, each one's own pad token left out.

    Padding is no part of a text. A policy whose pad token may end a response gets another
    (:func:`ensure_pad_token`); the reward model on the same trunk, which generates nothing and so knows of no
    such end, keeps the old one.
    """
    ours, theirs = one.get_vocab().items(), other.get_vocab().items()
    alone = {token for token, _ in ours - theirs}, {token for token, _ in theirs - ours}
    return alone[0] <= {one.pad_token} and alone[1] <= {other.pad_token}


def plain_generation(model: Any, eos_token_ids: Sequence[int] = ()) -> None:
    """Drop the sampling parameters that a model brings along, so that those of a call are all there are.

    What ends a response is kept: the ids given, then the model's own.
    """
    if model.generation_config is not None:
        ends = end_tokens(model, eos_token_ids)
        model.generation_config = import_transformers().GenerationConfig(
            bos_token_id=getattr(text_config(model), "bos_token_id", None),
            eos_token_id=list(ends) if len(ends) > 1 else next(iter(ends), None),
        )


def load_whole(
    kind: Any,
    name_or_path: str,
    what: str = "model",
    *,
    fresh: tuple[str, ...] = (),
    foreign_heads: bool = False,
    **options: Any,
) -> Any:
    """Load a model by a class of transformers, none of its weights drawn at random; in evaluation mode.

    Args:
        kind: such as ``AutoModelForCausalLM``.
        name_or_path: folder or hub name.
        what: words for it.
        fresh: see :func:`~torchrl_maxmin.models.integrity.require_all_weights`.
        foreign_heads: likewise.
        **options: of ``from_pretrained``.

    Raises:
        UserError: for files that cannot be read, or whose weights are not the model's, or not finite.
    """
    with reading(what, name_or_path):
        model, loaded = kind.from_pretrained(name_or_path, output_loading_info=True, **options)
    require_all_weights(model, loaded, name_or_path, fresh=fresh, foreign_heads=foreign_heads)
    return model.eval()


def load_causal_lm(name_or_path: str, dtype: torch.dtype | str = torch.float32, **options: Any) -> nn.Module:
    """Load a causal language model without dropout, in evaluation mode.

    Dropout would make the log-probabilities of rollout and training differ, so it is off
    for good: modules stay in evaluation mode while they are trained.

    Args:
        name_or_path: a model; or a folder of one LoRA adapter, which is merged into the model that it names.
        dtype: of the weights; ``auto`` is that of the file.
        **options: further ones of ``from_pretrained``, such as ``attn_implementation``.
    """
    require_causal_lm(name_or_path)
    base = adapted_model(name_or_path)
    kind = import_transformers().AutoModelForCausalLM
    model = load_whole(kind, base or name_or_path, dtype=dtype, **options)
    if base is not None:
        model = _with_adapter(model, name_or_path)
    plain_generation(model)
    return model.eval()


def _with_adapter(model: Any, folder: str) -> Any:
    """Load an adapter and add it to the weights of its model; returns a plain model."""
    peft, tokenizer = import_peft(), Path(folder) / "tokenizer_config.json"
    if tokenizer.is_file():  # a pad token that was added to it
        size = len(import_transformers().AutoTokenizer.from_pretrained(folder))
        if size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(size)
    with quiet_peft(), reading("adapter", folder):
        adapted = peft.PeftModel.from_pretrained(model, folder)
        require_whole_adapter(adapted, "default", folder)
        return adapted.merge_and_unload()


def is_encoder(config: Any) -> bool:
    """Whether a model reads its text in both directions (BERT, DeBERTa, ..., also BART and T5)."""
    known = type(config) in import_transformers().MODEL_FOR_MASKED_LM_MAPPING
    return bool(config.is_encoder_decoder) or (known and not getattr(config, "is_decoder", False))


def load_trunk(
    name_or_path: str, dtype: torch.dtype | str = torch.float32, *, alone: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Load what maps tokens to hidden states, decoder or encoder, and its tokenizer with a pad token.

    Like :func:`load_causal_lm` without dropout. An encoder keeps its tokenizer's own special
    tokens; its pooler, which nothing here reads, is not trained.

    Args:
        name_or_path: a model, with a head or without.
        dtype: of the weights; ``auto`` is that of the file.
        alone: whether the files hold the trunk and nothing else.
        **options: further ones of ``from_pretrained``.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: if there is no such model, or it is an encoder-decoder.
    """
    require_trunk(name_or_path)
    tokenizer = load_tokenizer(name_or_path)
    options |= {"dtype": dtype, "fresh": ("pooler.",), "foreign_heads": not alone}
    model = load_whole(import_transformers().AutoModel, name_or_path, **options)
    if not is_encoder(model.config):
        ensure_pad_token(tokenizer, model)
    elif tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {name_or_path} has no pad_token; set one and save it")
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    # for those who load the folder without us: absolute positions are right with padding at the end alone
    tokenizer.padding_side = "right"
    return model, tokenizer


def load_classifier(name_or_path: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a sequence classifier of any architecture, in evaluation mode.

    Raises:
        UserError: if there is none, or its head was never trained and would be drawn at random.
    """
    require_model(name_or_path)
    kind = import_transformers().AutoModelForSequenceClassification
    with reading("sequence classifier", name_or_path):
        model, loaded = kind.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    trunk = f"{model.base_model_prefix}."
    if head := {key for key in loaded["missing_keys"] if not key.startswith(trunk)}:
        raise UserError(
            f"{name_or_path} holds no reward head ({listed(head)} missing), so it would score at random; "
            "give a folder that the reward stage wrote, or another sequence classifier"
        )
    require_all_weights(model, loaded, name_or_path, unread=("lm_head.",))  # many were language models before
    return model.eval()
