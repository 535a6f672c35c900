"""Tokenizers as models bring them: with or without BOS, EOS at the end, a chat template."""

WORDS = ["a", "b", "c", "d", "hello", "user", "assistant", "system", "?", "brief"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
# as newer models: a thought is opened where an answer is asked for, and left out of what was said
THOUGHTFUL = CHATML.replace("<|start|>assistant {%", "<|start|>assistant <think> {%")

# as Mistral 7B v0.3: the system message stands in the last turn, if that is the user's
LAST_TURN = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}<s>{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}<|start|> {{ system }} {{ m['content'] }} <|end|>"
    "{% else %}<|start|> {{ m['content'] }} <|end|>{% endif %}"
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)
# as Phi-3: EOS stands behind the end of the last turn
TWO_ENDS = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
# as Qwen3: an empty thought stands before an answer, and earlier thoughts are left out
EMPTY_THOUGHT = (
    "{% for m in messages %}<|start|>{{ m['role'] }} "
    "{% if m['role'] == 'assistant' and loop.last %}<think> {% endif %}"
    "{{ m['content'].split('<think>')[-1] | trim }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def make_tokenizer(form="<s> $A", *, bos="<s>", eos="</s>", template=None):
    """Words as tokens; ``form`` is what the tokenizer puts around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<|start|>", "<|end|>", "<think>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token=bos, eos_token=eos
    )
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    made.chat_template = template
    return made


def save_chat_model(folder, tokenizer, **settings):
    """A tiny Llama with random weights and this tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(config | settings))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
