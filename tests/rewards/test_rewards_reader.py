"""Reading one vector from a text: the same on every side of padding, for every architecture."""

import pytest
import torch
from architectures import REFUSED, SERVED, write
from hypothesis import given
from hypothesis import strategies as st
from rewards_models import COMPLETIONS, PROMPTS, chat_tokenizer, save_decoder, save_encoder
from transformers import AutoModel, AutoModelForCausalLM

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import is_encoder, load_config, load_trunk
from torchrl_maxmin.models.sequences import keep_last, pack_left, pad_left, pad_right, segment_ids
from torchrl_maxmin.rewards.base import has_linear_score
from torchrl_maxmin.rewards.features import load_feature_trunk, text_features
from torchrl_maxmin.rewards.reader import TextReader, load_reader

ENCODERS = ["bert", "roberta", "mpnet", "deberta-v2", "electra", "distilbert", "modernbert"]
DECODERS = ["gpt2", "llama", "mistral", "bloom"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            save = save_encoder if kind in ENCODERS else save_decoder
            made[kind] = save(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return folder


def read(reader, trunk, tokens, mask):
    with torch.no_grad():
        return reader.pool(*reader.states(trunk, tokens, mask))


def alone(trunk, tokenizer, pooling, prompt, completion):
    """The vector of one text by transformers: no padding, no ids but the tokenizer's own."""
    if is_encoder(trunk.config):
        texts = ([prompt], [completion]) if prompt else ([completion],)
        inputs = tokenizer(*texts, return_tensors="pt")
    else:
        rows = tokenizer(prompt).input_ids + tokenizer(completion, add_special_tokens=False).input_ids
        inputs = {"input_ids": torch.tensor([[*rows, tokenizer.eos_token_id]])}
    with torch.no_grad():
        states = trunk(**inputs).last_hidden_state[0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_vectors_are_those_of_texts_alone(folders, kind):
    trunk, tokenizer = load_trunk(folders(kind))
    default = "mean" if kind in ENCODERS else "last"
    assert TextReader(trunk, tokenizer).pooling == default
    for pooling in ("mean", "last", "cls"):
        if pooling == "cls" and kind in DECODERS:
            continue
        reader = TextReader(trunk, tokenizer, pooling=pooling)
        rows = reader.encode(PROMPTS, COMPLETIONS)
        expected = torch.stack(
            [alone(trunk, tokenizer, pooling, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        )
        assert expected.std(0).mean() > 0.02
        for pad in (pad_left, pad_right):
            tokens, mask = pad(rows, reader.pad_id)
            found = read(reader, trunk, tokens, mask)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            noisy = torch.where(mask, tokens, 7)  # what lies under the padding is not read
            torch.testing.assert_close(read(reader, trunk, noisy, mask), expected, atol=1e-5, rtol=1e-5)


def test_the_models_on_trial_tell_positions_and_segments_apart(folders):
    """Or the comparison above would pass with neither."""
    trunk, tokenizer = load_trunk(folders("bert"))
    one = TextReader(trunk, tokenizer)
    tokens, mask = pad_right(one.encode(["the film"], ["was great"]), 0)
    plain = read(one, trunk, tokens, mask)
    one._separator = None
    assert (read(one, trunk, tokens, mask) - plain).abs().max() > 1e-2
    assert (read(one, trunk, tokens[:, [0, 2, 1, 3, 4, 5, 6]], mask) - plain).abs().max() > 1e-2


def test_prompt_left_and_response_right_of_padding_are_one_text(folders):
    trunk, tokenizer = load_trunk(folders("bert"))
    reader = TextReader(trunk, tokenizer)
    rows = reader.encode(PROMPTS, COMPLETIONS)
    left, left_mask = pad_left([row[:2] for row in rows], 0)
    right, right_mask = pad_right([row[2:] for row in rows], 0)
    both = torch.cat([left, right], -1), torch.cat([left_mask, right_mask], -1)
    torch.testing.assert_close(
        read(reader, trunk, *both), read(reader, trunk, *pad_right(rows, 0)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", DECODERS)
def test_longer_tokens_than_positions_keep_the_end(folders, kind):
    trunk, tokenizer = load_trunk(folders(kind))
    reader = TextReader(trunk, tokenizer)
    long = [[1] + [7 + i % 15 for i in range(40)], [1, 8, 9]]
    expected = read(reader, trunk, *pad_right([long[0][-reader.max_length :], long[1]], reader.pad_id))
    for pad in (pad_left, pad_right):
        found = read(reader, trunk, *pad(long, reader.pad_id))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "limit"), [("bert", 24), ("roberta", 24), ("mpnet", 23), ("gpt2", 24), ("llama", 24)]
)
def test_the_longest_text_is_what_positions_allow(folders, kind, limit):
    trunk, tokenizer = load_trunk(folders(kind))
    reader = TextReader(trunk, tokenizer)
    assert reader.max_length == limit
    tokens, mask = pad_right(reader.encode(["the film " * 30], ["was great " * 30]), reader.pad_id)
    assert tokens.shape == (1, limit)
    assert torch.isfinite(read(reader, trunk, tokens, mask)).all()


def test_pad_token_equal_to_eos_gets_one_of_its_own(tmp_path):
    trunk, tokenizer = load_trunk(save_decoder(tmp_path, "llama", chat_tokenizer(pad_token="</s>")))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert trunk.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_features_are_pooled_state_and_sums(folders, kind):
    model, reader = load_feature_trunk(folders(kind))
    rows = reader.encode(PROMPTS, COMPLETIONS)
    features = text_features(model, rows, reader.pad_id, batch_size=3, reader=reader)
    trunk = AutoModel.from_pretrained(folders(kind)).eval()
    for i, (row, prompt, completion) in enumerate(zip(rows, PROMPTS, COMPLETIONS, strict=True)):
        total = len(row) * alone(trunk, reader.tokenizer, "mean", prompt, completion)
        pooled = alone(trunk, reader.tokenizer, reader.pooling, prompt, completion)
        embedded = trunk.get_input_embeddings()(torch.tensor(row)).sum(0)
        expected = torch.cat([pooled, total, embedded]).detach()
        torch.testing.assert_close(features[i], expected, atol=1e-4, rtol=1e-4)
    if kind == "gpt2":
        assert torch.equal(features, text_features(model, rows, reader.pad_id, batch_size=3))


def masks():
    return st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5)


@given(masks())
def test_pack_left_keeps_real_tokens_in_order(given_mask):
    mask = torch.tensor(given_mask)
    tokens = torch.arange(mask.numel()).reshape(mask.shape) + 1
    packed, packed_mask = pack_left(tokens, mask, 0)
    assert packed.shape[-1] == int(mask.sum(-1).max())
    for row, old, keep, real in zip(packed, tokens, mask, packed_mask, strict=True):
        kept = old[keep].tolist()
        assert row.tolist() == kept + [0] * (len(row) - len(kept))
        assert real.tolist() == [True] * len(kept) + [False] * (len(row) - len(kept))


@given(masks(), st.integers(1, 7))
def test_keep_last_keeps_the_last_real_tokens(given_mask, length):
    mask = torch.tensor(given_mask)
    for kept, old in zip(keep_last(mask, length), mask, strict=True):
        assert kept.nonzero().flatten().tolist() == old.nonzero().flatten().tolist()[-length:]


def test_segment_ids_are_those_of_the_tokenizer(folders):
    _, tokenizer = load_trunk(folders("bert"))
    both = tokenizer(["the film", "we"], ["was great", "loved it a b"], padding=True, return_tensors="pt")
    mask = both["attention_mask"].bool()
    expected = both["token_type_ids"] * mask
    assert torch.equal(segment_ids(both["input_ids"], mask, tokenizer.sep_token_id), expected)
    one = tokenizer(["the film"], return_tensors="pt")["input_ids"]
    assert not segment_ids(one, one > 0, tokenizer.sep_token_id).any()


def test_encoders_and_decoders_are_told_apart(folders):
    from transformers import AutoConfig, BartConfig, T5Config

    assert all(is_encoder(AutoConfig.from_pretrained(folders(kind))) for kind in ENCODERS)
    assert not any(is_encoder(AutoConfig.from_pretrained(folders(kind))) for kind in DECODERS)
    assert is_encoder(BartConfig())
    assert is_encoder(T5Config())


def test_an_encoders_pooler_is_not_trained(folders):
    trunk, _ = load_trunk(folders("bert"))
    assert not any(p.requires_grad for p in trunk.pooler.parameters())
    assert all(p.requires_grad for n, p in trunk.named_parameters() if not n.startswith("pooler"))
    assert not trunk.training


def test_mistakes(folders, tmp_path):
    from transformers import BartConfig, BartModel

    trunk, tokenizer = load_trunk(folders("gpt2"))
    with pytest.raises(UserError, match="'cls' needs an encoder"):
        TextReader(trunk, tokenizer, pooling="cls")
    with pytest.raises(UserError, match="none of last, mean, cls"):
        TextReader(trunk, tokenizer, pooling="max")
    small = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30, "encoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8}
    BartModel(BartConfig(**small, **heads)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        load_trunk(str(tmp_path))


def test_a_language_model_is_read_like_its_trunk(folders):
    trunk, tokenizer = load_trunk(folders("llama"))
    model = AutoModelForCausalLM.from_pretrained(folders("llama")).eval()
    rows = TextReader(trunk, tokenizer).encode(PROMPTS, COMPLETIONS)
    reader = TextReader(model, tokenizer)
    tokens, mask = pad_right(rows, reader.pad_id)
    assert torch.equal(read(reader, model.model, tokens, mask), read(reader, trunk, tokens, mask))


@pytest.mark.parametrize("name", sorted({*SERVED, *REFUSED} - {"T5", "BART"}))
def test_a_reader_without_weights_reads_alike(name, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path)
    before = torch.get_rng_state()
    light = load_reader(folder)
    has_linear_score(load_config(folder))
    assert torch.equal(torch.get_rng_state(), before)
    whole = TextReader(*load_trunk(folder))
    tokens, mask = pad_right(light.encode(PROMPTS, COMPLETIONS), light.pad_id)
    inputs, expected = (reader.packed(tokens, mask)[0] for reader in (light, whole))
    assert all(torch.equal(inputs[key], expected[key]) for key in inputs.keys() | expected.keys())
    for field in ("max_length", "pooling", "pad_id", "_packs"):
        assert getattr(light, field) == getattr(whole, field)
