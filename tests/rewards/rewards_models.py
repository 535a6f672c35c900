"""Tiny models with random weights, of the architectures that users bring, and texts to score."""

import torch

WORDS = """the film was great awful we loved it really long story and music watched home
at twice my sister a b""".split()  # noqa: SIM905
PROMPTS = ["the film", "we loved", "it was really", "", "the", "my sister watched the film", "we", "it"]
COMPLETIONS = [
    "was great",
    "the long story it was really long and twice the music was great we loved it",
    "awful",
    "my sister watched it twice at home",
    "",
    "it was awful really awful",
    "loved it",
    "was a",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 24,
}


def bert_tokenizer(kind="bert"):
    """Words as tokens, with the special tokens of BERT or of RoBERTa."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    second = "[SEP] $B:0 [SEP]" if kind == "roberta" else "$B:1 [SEP]:1"
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] {second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    segments = [] if kind == "roberta" else ["token_type_ids"]
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=24,
        model_input_names=["input_ids", *segments, "attention_mask"],
        **tokens,
    )


def chat_tokenizer(pad_token="<pad>"):
    """Words as tokens; BOS in front, a chat template, and a pad token that may equal EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "<assistant>", "<system>"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad_token
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def save_encoder(folder, kind="bert", **options):
    """An encoder's trunk, or its classifier if ``num_labels`` is given, with its tokenizer."""
    tokenizer = bert_tokenizer(
        "roberta" if kind in ("roberta", "mpnet", "distilbert", "modernbert") else "bert"
    )
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0, "type_vocab_size": 2}
    if kind in ("roberta", "mpnet"):
        sizes |= {"max_position_embeddings": 25, "type_vocab_size": 1}  # one position is the padding's
    name = {
        "bert": "Bert",
        "roberta": "Roberta",
        "mpnet": "MPNet",
        "deberta-v2": "DebertaV2",
        "electra": "Electra",
    }
    name |= {"distilbert": "DistilBert", "modernbert": "ModernBert"}
    if kind == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": len(tokenizer)}
        sizes |= {"max_position_embeddings": 24, "pad_token_id": 0, "initializer_range": 0.3}
    if kind == "modernbert":
        special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        sizes |= special | {"reference_compile": False}
    return _save(name[kind], sizes, options, tokenizer, folder, "Model" if not options else None)


def save_decoder(folder, kind="llama", tokenizer=None, **options):
    """A decoder's causal language model, or its classifier if ``num_labels`` is given, with a tokenizer."""
    tokenizer = tokenizer or chat_tokenizer()
    sizes = SIZES | {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes["pad_token_id"] = tokenizer.pad_token_id
    if kind == "bloom":
        sizes |= {"n_layer": 2, "n_head": 2}
    name = {"llama": "Llama", "bloom": "Bloom", "gpt2": "GPT2", "mistral": "Mistral"}[kind]
    causal = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    return _save(name, sizes, options, tokenizer, folder, None if options else causal)


def _save(name, sizes, options, tokenizer, folder, head):
    import transformers

    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    torch.manual_seed(0)
    getattr(transformers, f"{name}{head or 'ForSequenceClassification'}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
