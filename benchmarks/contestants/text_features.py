"""Features of pairs of texts by one of the ways of ``text_features.py``, in a process of its own.

Called with the way, a folder, and the numbers of texts and of pairs. Writes a line of JSON.
"""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from torchrl_maxmin.models.sequences import backbone_of, pad_right
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import features
from torchrl_maxmin.rewards.pairs import PairTokens, raw_differences

WORDS = [f"word{i}" for i in range(5000)]
READ_AT_ONCE = 256


def write_model(folder: Path) -> None:
    """Write an encoder of MiniLM's size, and a tokenizer whose tokens are words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=512, **names).save_pretrained(folder)
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(special) + len(WORDS), **sizes)).save_pretrained(folder)


def pairs_of(num_texts: int, num_pairs: int) -> PreferenceDataset:
    """Pairs of texts that all come back equally often."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 56))) for _ in range(num_texts)]
    rows = []
    for i in range(num_pairs):
        one, other = i % num_texts, (i + 1 + i // num_texts) % num_texts
        rows.append({"chosen": texts[one], "rejected": texts[other], "prompt": "", "user_id": i % 500})
    return PreferenceDataset.load(datasets.Dataset.from_list(rows))


def every_place(model: torch.nn.Module, reader: features.TextReader, rows: list[list[int]]) -> torch.Tensor:
    """Features of all rows as they were read before, padded to the longest of 256."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    embed, found = model.get_input_embeddings(), torch.empty(len(rows), 3 * model.config.hidden_size)
    for start in range(0, len(order), READ_AT_ONCE):
        part = order[start : start + READ_AT_ONCE]
        tokens, mask = pad_right([rows[i] for i in part], reader.pad_id)
        with torch.no_grad():
            states, present = reader.states(model, tokens, mask)
            sides = (states, present), (embed(tokens), mask)
            sums = [(x * real[..., None].to(x.dtype)).sum(1) for x, real in sides]
            found[part] = torch.cat([reader.pool(states, present), *sums], -1)
    return found


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    model = str(folder / "model")
    if not Path(model).is_dir():
        write_model(Path(model))
    data = pairs_of(*map(int, sys.argv[3:]))
    read: Counter[str] = Counter()
    load = features.load_feature_trunk

    def counted(*arguments, **options):
        trunk, reader = load(*arguments, **options)

        def note(module, positional, named):
            read.update(rows=len(named["input_ids"]), tokens=named["input_ids"].numel())

        backbone_of(trunk).register_forward_pre_hook(note, with_kwargs=True)
        return trunk, reader

    features.load_feature_trunk = counted
    start = time.process_time()
    if way == "every place":
        trunk, reader = features.load_feature_trunk(model)
        pairs = PairTokens(data, reader.encode, reader.pad_id)
        chosen, rejected = every_place(trunk, reader, list(pairs.rows)).chunk(2)
        found = chosen - rejected
        torch.save(found, folder / "every_place.pt")
    else:
        found = raw_differences(data, range(len(data)), model, None, "cpu", cache=folder / "cache")
    seconds = time.process_time() - start
    wanted = torch.load(folder / "every_place.pt", mmap=True)
    distance = float((found - wanted).abs().max() / wanted.abs().max())
    figures = {"rows": read["rows"], "tokens": read["tokens"], "distance": distance}
    print(json.dumps({"cpu_seconds": seconds, **figures}))


if __name__ == "__main__":
    main()
