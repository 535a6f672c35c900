"""Features of texts: each distinct text is read once, the same whatever its company; rows that need room."""

import itertools
from collections import Counter

import pytest
import torch
from ranks import on_ranks
from rewards_models import save_encoder

from torchrl_maxmin.clustering import fit_choices
from torchrl_maxmin.core.distributed import process_group
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import features
from torchrl_maxmin.rewards.features import (
    feature_batches,
    gathered_differences,
    load_feature_trunk,
    roomy_rows,
    text_features,
)
from torchrl_maxmin.rewards.pairs import PairTokens, feature_choices, feature_differences, raw_differences


def pairs_of(texts, count, users=3):
    """Pairs of texts that come back again and again."""
    import datasets

    n = len(texts)
    rows = [
        {
            "prompt": "the",
            "chosen": texts[i % n],
            "rejected": texts[(i + 1 + i // n) % n],
            "user_id": i % users,
        }
        for i in range(count)
    ]
    return PreferenceDataset.load(datasets.Dataset.from_list(rows))


def texts_of(count, words=("film", "was", "great", "long", "cast", "dull")):
    longer = (product for size in itertools.count(1) for product in itertools.product(words, repeat=size))
    return [" ".join(product) for product in itertools.islice(longer, count)]


@pytest.fixture
def rows_read(monkeypatch):
    """Rows that frozen trunks have read, counted at their forward."""
    count = Counter()

    def load(*arguments, **options):
        model, reader = load_feature_trunk(*arguments, **options)
        count["loads"] += 1

        def note(module, positional, named):
            count["rows"] += len(named["input_ids"] if "input_ids" in named else positional[0])

        backbone_of(model).register_forward_pre_hook(note, with_kwargs=True)
        return model, reader

    monkeypatch.setattr(features, "load_feature_trunk", load)
    return count


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_differences_are_those_of_texts_read_one_by_one(kind, tiny_model, tmp_path):
    folder = tiny_model if kind == "gpt2" else save_encoder(tmp_path / "bert")
    data = pairs_of(texts_of(11), 60)
    model, reader = load_feature_trunk(folder)
    pairs = PairTokens(data, reader.encode, reader.pad_id)
    alone = torch.cat([text_features(model, [row], reader.pad_id, reader=reader) for row in pairs.rows])
    expected = alone[:60] - alone[60:]
    found = raw_differences(data, range(60), folder, None, "cpu")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad
    some = [3, 5, 59]
    torch.testing.assert_close(raw_differences(data, some, folder, None, "cpu"), found[some], atol=0, rtol=0)
    unit = feature_differences(data, folder, None, "cpu")
    torch.testing.assert_close(unit, found / found.std(0).clamp_min(1e-6), atol=1e-6, rtol=1e-6)


def test_every_distinct_text_is_read_once(tiny_model, rows_read):
    """1,500 texts in 33,000 places."""
    texts = texts_of(1500)
    data = pairs_of(texts, 16_500)
    places = Counter([*data.chosen, *data.rejected])
    assert len(places) == 1500
    assert places.total() == 33_000
    raw_differences(data, range(len(data)), tiny_model, None, "cpu")
    assert rows_read == {"loads": 1, "rows": 1500}


def test_batches_are_of_one_length_and_hold_so_many_tokens(tiny_model, monkeypatch):
    monkeypatch.setattr(features, "TOKENS_AT_ONCE", 20)
    model, reader = load_feature_trunk(tiny_model)
    rows = [[1] + [5] * (i % 7) + [2] for i in range(40)] + [[1] + [6] * 30 + [2]]
    found = [part for part, _ in feature_batches(model, rows, reader.pad_id, 4, reader=reader)]
    assert sorted(itertools.chain(*found)) == list(range(41))
    for part in found:
        lengths = {len(rows[i]) for i in part}
        assert len(lengths) == 1
        assert len(part) <= 4
        assert len(part) == 1 or len(part) * lengths.pop() <= 20


def test_features_do_not_depend_on_the_other_texts(tiny_model):
    """Bit for bit, which makes what was kept as good as what is read."""
    model, reader = load_feature_trunk(tiny_model)
    rows = [reader.encode(["the film"], [text])[0] for text in texts_of(90)]
    together = text_features(model, rows, reader.pad_id, reader=reader)
    some = text_features(model, rows[::7], reader.pad_id, batch_size=2, reader=reader)
    torch.testing.assert_close(together[::7], some, atol=1e-6, rtol=1e-6)
    long = text_features(model, [*rows[::7], rows[-1] * 2], reader.pad_id, reader=reader)
    assert torch.equal(long[:-1], text_features(model, rows[::7], reader.pad_id, reader=reader))


def test_loading_a_trunk_draws_nothing(make_model):
    """A model without a pad token gets a random one; what is drawn later must not tell."""
    folder = make_model("no-pad")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    data = pairs_of(texts_of(4), 8)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    raw_differences(data, range(8), folder, None, "cpu")
    assert torch.equal(torch.rand(2), expected)


def test_progress_of_reading_is_shown(tiny_model, monkeypatch):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def bar(description, total):
        steps = []
        yield lambda count: steps.append(count)
        seen.append((description, total, sum(steps)))

    monkeypatch.setattr(features, "progress_bar", bar)
    raw_differences(pairs_of(texts_of(11), 60), range(60), tiny_model, None, "cpu")
    assert seen == [("encoding texts", 11, 11)]


def test_a_share_without_pairs_has_a_width(tiny_model):
    data = pairs_of(texts_of(11), 60)
    width = raw_differences(data, [1], tiny_model, None, "cpu").shape[1]
    assert raw_differences(data, [], tiny_model, None, "cpu").shape == (0, width)


# -- room ------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_memory_lies_in_a_file(tiny_model, monkeypatch):
    data = pairs_of(texts_of(11), 60)
    expected = feature_choices(data, tiny_model, None, "cpu")
    mapped = []
    of_file = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda x: mapped.append(type(x).__name__) or of_file(x))
    monkeypatch.setattr(features, "free_memory", lambda: 0)
    found = feature_choices(data, tiny_model, None, "cpu")
    assert mapped.count("memmap") == 2  # features, and their differences
    assert torch.equal(found.differences, expected.differences)
    assert torch.equal(
        fit_choices(found, 2, 0, num_restarts=1).weight, fit_choices(expected, 2, 0, num_restarts=1).weight
    )


def test_a_mapped_file_is_gone_with_its_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda: 0)
    monkeypatch.setattr(features.tempfile, "tempdir", str(tmp_path))
    rows = roomy_rows(1000, 3, torch.bfloat16)
    rows[:] = torch.arange(3000).view(1000, 3)
    assert rows[999].tolist() == torch.arange(2997, 3000).bfloat16().tolist()
    assert list(tmp_path.iterdir()) == []  # it has no name even now


def test_no_room_at_all_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "free_memory", lambda: 0)
    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"0.4 GB, too much for the memory.*No space left.*set TMPDIR"):
        roomy_rows(100_000, 1000)


def test_bfloat16_halves_what_is_kept_and_mapped(tiny_model, monkeypatch):
    data = pairs_of(texts_of(11), 60)
    exact = raw_differences(data, range(60), tiny_model, None, "cpu")
    near = raw_differences(data, range(60), tiny_model, None, "cpu", dtype=torch.bfloat16)
    assert near.dtype == torch.float32  # there is room
    assert 0 < (near - exact).abs().max() < 0.02 * exact.abs().max()
    chosen, rejected = torch.tensor([0, 1]), torch.tensor([1, 1])
    monkeypatch.setattr(features, "free_memory", lambda: 0)
    mapped = gathered_differences(torch.tensor([[1.0], [3.0]]).bfloat16(), chosen, rejected)
    assert mapped.dtype == torch.bfloat16
    assert mapped.tolist() == [[-2.0], [0.0]]
    unit = feature_differences(data, tiny_model, None, "cpu", dtype=torch.bfloat16)
    assert unit.dtype == torch.bfloat16
    deviation = unit.double().std(0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=0.01, rtol=0)
    choices = feature_choices(data, tiny_model, None, "cpu", dtype=torch.bfloat16)
    assert torch.isfinite(fit_choices(choices, 2, 0, m_step="exact").weight).all()


# -- several processes -----------------------------------------------------------------------------


def read_on_ranks(texts, count, model):
    with process_group("ddp"):
        read = Counter()

        def load(*arguments, **options):
            trunk, reader = load_feature_trunk(*arguments, **options)
            backbone_of(trunk).register_forward_pre_hook(
                lambda module, positional, named: read.update(rows=len(named["input_ids"])), with_kwargs=True
            )
            return trunk, reader

        features.load_feature_trunk = load
        data = pairs_of(texts, count)
        near = feature_differences(data, model, None, "cpu", dtype=torch.bfloat16)
        return feature_differences(data, model, None, "cpu").tolist(), near.tolist(), read["rows"]


def test_processes_read_a_share_of_the_distinct_texts(tiny_model):
    texts = texts_of(11)
    data = pairs_of(texts, 60)
    expected, near = (
        feature_differences(data, tiny_model, None, "cpu", dtype=dtype).tolist()
        for dtype in (torch.float32, torch.bfloat16)
    )
    ranks = on_ranks(2, read_on_ranks, texts, 60, tiny_model)
    assert [rows for _, _, rows in ranks] == [2 * 6, 2 * 5]
    for found, rounded, _ in ranks:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(rounded), torch.tensor(near), atol=1e-2, rtol=1e-2)
