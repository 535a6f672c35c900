"""What several reproductions' tests share."""

import pytest
import torch
from reproductions_chat import chat_model, chat_tokenizer


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    model = chat_model(tie_word_embeddings=False)  # a tied head, untrained, repeats the last token
    with torch.no_grad():
        model.lm_head.weight[2] *= 2  # logits that vary more: some responses end, and some do not
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
