"""Tiny random models of many architectures, with weights that are far from their initial values."""

from __future__ import annotations

import torch
import transformers

#: settings that most decoders share; the ids are those of the embedded world's tokenizer
PLAIN = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WIDE = {"head_dim": 8}
OPT = {"ffn_dim": 32, "dropout": 0.0}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {**PLAIN, **WIDE, **LOCAL}

#: name -> (model class, config class, settings); classes without "For" answer with a language model's head
SERVED = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "GPT-J (bias)": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    "Bloom (ALiBi)": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "MPT (ALiBi)": (
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", PLAIN),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**PLAIN, **OPT, "word_embed_proj_dim": 16}),
    "OPT (projected)": (
        "OPTForCausalLM",
        "OPTConfig",
        {**PLAIN, **OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", PLAIN),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**PLAIN, **EXPERTS}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**PLAIN, **WIDE}),
    "Phi (bias)": ("PhiForCausalLM", "PhiConfig", PLAIN),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", PLAIN),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", PLAIN),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", PLAIN),
    "DeepSeek V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **PLAIN,
            **LATENT,
            "head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "MiniCPM3 (scaled states)": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {**PLAIN, **LATENT, "dim_model_base": 4},
    ),
    "Granite (scale)": ("GraniteForCausalLM", "GraniteConfig", {**PLAIN, "logits_scaling": 8.0}),
    "GraniteMoe (scale)": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**PLAIN, **EXPERTS, "logits_scaling": 4.0},
    ),
    "HyperCLOVAX (scale)": ("HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", {**PLAIN, "logits_scaling": 0.25}),
    "Cohere (scale)": ("CohereForCausalLM", "CohereConfig", PLAIN),
    "Cohere2 (scale)": ("Cohere2ForCausalLM", "Cohere2Config", {**PLAIN, **LOCAL}),
    "FalconH1 (scale)": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**PLAIN, **MAMBA, "mamba_d_ssm": 32, "mamba_chunk_size": 4, "lm_head_multiplier": 0.3},
    ),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**PLAIN, **WIDE}),
    "Gemma2 (soft cap)": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA3, "final_logit_softcapping": 3.0}),
    "Gemma3 (text)": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "Gemma3 (images)": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": GEMMA3,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
}

#: those that are refused, and what the one line says
REFUSED = {
    # its recurrence runs over padding
    "RecurrentGemma (soft cap)": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **PLAIN,
            "lru_width": 16,
            "attention_window_size": 8,
            "logits_soft_cap": 3.0,
            "block_types": ["recurrent", "attention"],
        },
        "a padded prompt gets other log-probabilities than the same prompt alone",
    ),
    # absolute positions, and no position ids
    "RoFormer": (
        "RoFormerForCausalLM",
        "RoFormerConfig",
        {**PLAIN, "is_decoder": True, "embedding_size": 16},
        "changes its hidden states before the output embeddings",
    ),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 32},
        "a padded prompt gets other log-probabilities than the same prompt alone",
    ),
    "BERT": ("BertForMaskedLM", "BertConfig", PLAIN, "is an encoder \\(bert\\)"),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        "is an encoder-decoder \\(t5\\)",
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "max_position_embeddings": 64,
        },
        "is an encoder-decoder \\(bart\\)",
    ),
}


def build(name: str, tokenizer) -> transformers.PreTrainedModel:
    """A model whose logits are far from uniform, and whose norms and biases are not their initial ones."""
    model_class, config_class, settings = (SERVED | REFUSED)[name][:3]
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if "text_config" in settings:
        images = {"image_token_id": len(tokenizer) - 1, "boi_token_id": len(tokenizer) - 2}
        images["eoi_token_id"] = len(tokenizer) - 3
        settings = settings | images | {"text_config": settings["text_config"] | ids}
        ids.pop("vocab_size")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(settings | ids)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        if model.get_output_embeddings() is not None and not model.config.is_encoder_decoder:
            logits = model(input_ids=torch.arange(8)[None]).logits
            model.get_output_embeddings().weight /= logits.std()  # far from uniform, whatever scales them
    return model


def write(name: str, tokenizer, folder) -> str:
    """The model and its tokenizer in a folder."""
    build(name, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def brevity(prompts, completions):
    """A reward of one group: the shorter, the better."""
    return [-len(completion.split()) / 10 for completion in completions]


def letters(prompts, completions):
    """A reward of another group: early letters."""
    return [sum((ord(word[0]) - 110) / 10 for word in completion.split()) for completion in completions]
