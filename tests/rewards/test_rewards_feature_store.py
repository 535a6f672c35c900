"""Features on disk: found again by model and text, never trusted when damaged, safe for two at once."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.cli.parsing import parse_config
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.diagnosis.stage import DiagnoseConfig, run_diagnose
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import feature_store, features
from torchrl_maxmin.rewards.feature_store import FeatureStore, cache_folder, row_key, store_facts
from torchrl_maxmin.rewards.pairs import raw_differences
from torchrl_maxmin.trainers.reward import run_reward
from torchrl_maxmin.trainers.reward_config import RewardConfig

ROWS = [[1, 5, 2], [1, 2], [], [7] * 40]
VALUES = torch.arange(12.0).view(4, 3)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path, {"model": "a"})


def held(store, rows=ROWS):
    """Place: values of what a store holds."""
    keys = [row_key(row) for row in rows]
    return {p: v.tolist() for part, values in store.held(keys) for p, v in zip(part, values, strict=True)}


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_what_was_added_is_found(store):
    assert held(store) == {}
    store.add([row_key(row) for row in ROWS[:2]], VALUES[:2])
    store.add([row_key(row) for row in ROWS[2:]], VALUES[2:])
    assert held(store) == dict(enumerate(VALUES.tolist()))
    assert held(store, [[9], ROWS[3]]) == {1: VALUES[3].tolist()}
    assert held(FeatureStore(store.folder.parent, {"model": "b"})) == {}
    store.add([row_key(row) for row in ROWS[:2]], VALUES[:2])  # by another process, say
    assert len(files(store)) == 2


def test_what_was_used_the_longest_ago_is_pruned_first(store, tmp_path, capsys, monkeypatch):
    other = FeatureStore(tmp_path, {"model": "b"})
    keys = [row_key(row) for row in ROWS]
    for age, (owner, row) in enumerate(((store, 0), (other, 1), (store, 2), (other, 3))):
        owner.add(keys[row : row + 1], VALUES[row : row + 1])
        (path,) = (p for p in owner.folder.iterdir() if p.stat().st_mtime > 1e9)
        os.utime(path, (1000 + age, 1000 + age))
    size = path.stat().st_size
    assert list(held(store, ROWS[:1])) == [0]  # the oldest, but it was read just now
    assert feature_store.prune(tmp_path, 4 * size) == 0
    assert feature_store.prune(tmp_path, 3 * size) == size
    assert held(other).keys() == {3}
    monkeypatch.setenv("TORCHRL_MAXMIN_CACHE_BYTES", str(2 * size))
    assert [places for places, _ in store.kept([row_key([9])], [([0], VALUES[:1])])] == [[0]]
    kept = set(tmp_path.glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in kept) <= 2 * size
    assert held(store, [[9]]) == {0: VALUES[0].tolist()}  # what this run made is the newest
    assert "kept features are removed" in " ".join(capsys.readouterr().err.split())


def test_a_limit_of_the_cache_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("TORCHRL_MAXMIN_CACHE_BYTES", "5 GB")
    with pytest.raises(UserError, match="TORCHRL_MAXMIN_CACHE_BYTES is a whole number of bytes, not '5 GB'"):
        cache_folder("true")
    assert cache_folder("false") is None


def test_only_old_leftovers_of_other_processes_go(store, tmp_path):
    store.add([row_key(ROWS[0])], VALUES[:1])
    for name, age in (("a.7.partial", 0.0), ("b.7.partial", 1000.0)):
        (store.folder / name).write_bytes(b"half")
        if age:
            os.utime(store.folder / name, (age, age))
    assert feature_store.prune(tmp_path, 1 << 30) == 0
    assert [name for name in files(store) if name.endswith("partial")] == ["a.7.partial"]


def test_bfloat16_comes_back(store):
    store.add([row_key(ROWS[0])], VALUES[:1].bfloat16())
    ((_, values),) = store.held([row_key(ROWS[0])])
    assert values.dtype == torch.bfloat16


@settings(deadline=None, max_examples=60)
@given(st.integers(0), st.integers(1, 255), st.booleans())
def test_no_damage_is_trusted(tmp_path_factory, place, flip, cut):
    """Any byte another, or the file cut off anywhere: right numbers, or none."""
    store = FeatureStore(tmp_path_factory.mktemp("damage"), {"model": "a"})
    store.add([row_key(row) for row in ROWS], VALUES)
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    place %= len(content)
    if cut:
        content = content[:place]
    else:
        content[place] ^= flip
    path.write_bytes(content)
    found = held(store)
    assert found.items() <= dict(enumerate(VALUES.tolist())).items()
    if len(found) < len(ROWS):
        store.add([row_key(row) for row in ROWS], VALUES)
        assert held(store) == dict(enumerate(VALUES.tolist()))


@pytest.mark.parametrize(
    ("written", "read"),
    [(b'"F32"', b'"I32"'), (b"[4,3]", b"[3,4]"), (b"[4,3]", b"[ 12]"), (b"[4,32]", b"[8,16]")],
)
def test_numbers_are_not_read_as_others(store, written, read):
    """The same bytes under another header."""
    store.add([row_key(row) for row in ROWS], VALUES)
    (path,) = store.folder.iterdir()
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, read))
    assert held(store) == {}
    assert files(store) == []


def test_what_is_read_is_written_by_and_by(store, monkeypatch):
    """A run that is stopped loses no more than a file's worth."""
    monkeypatch.setattr(feature_store, "_WRITTEN_BYTES", 24)
    keys = [row_key([i]) for i in range(9)]

    def read():
        for i in range(7):
            yield [i], torch.tensor([[float(i), 1.0]])
        raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(store.kept(keys, read()))
    assert held(store, [[i] for i in range(9)]) == {i: [float(i), 1.0] for i in range(6)}
    assert len(files(store)) == 2


def test_half_written_files_are_no_files(store):
    store.add([row_key(ROWS[0])], VALUES[:1])
    (path,) = store.folder.iterdir()
    shutil.copy(path, path.with_suffix(".77.partial"))
    path.unlink()
    assert held(store) == {}


def test_a_full_disk_is_said_and_no_more(store, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.os, "fsync", full)
    store.add([row_key(ROWS[0])], VALUES[:1])
    assert files(store) == []
    assert "features are not kept in" in " ".join(capsys.readouterr().err.split())


def add_and_read(folder, start, barrier):
    store = FeatureStore(folder, {"model": "a"})
    barrier.wait()
    for i in range(start, start + 20):
        store.add([row_key([i]), row_key([1000 + i])], torch.tensor([[float(i)], [1000.0 + i]]))
        for place, value in held(store, [[j] for j in range(30)]).items():
            assert value == [place]


def test_two_processes_at_once(tmp_path):
    """Half of the rows are written by both."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=add_and_read, args=(tmp_path, start, barrier)) for start in (0, 10)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    store = FeatureStore(tmp_path, {"model": "a"})
    assert held(store, [[j] for j in range(30)]) == {j: [float(j)] for j in range(30)}
    assert len(files(store)) == 30


# -- what a model's features are known by ----------------------------------------------------------


def test_facts_change_with_weights_config_and_reading(tiny_model, make_model, tmp_path):
    same = shutil.copytree(tiny_model, tmp_path / "same")
    facts = store_facts(tiny_model, pooling="last")
    assert store_facts(str(same), pooling="last") == facts
    assert store_facts(str(same), pooling="mean") != facts
    weights = same / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert store_facts(str(same), pooling="last") != facts
    weights.write_bytes((Path(tiny_model) / "model.safetensors").read_bytes())
    assert store_facts(str(same), pooling="last") == facts
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    assert store_facts(str(same), pooling="last") != facts


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch):
    class Config:
        _commit_hash = None

    monkeypatch.setattr(feature_store, "load_config", lambda name: Config)
    assert store_facts("someone/model") is None
    Config._commit_hash = "abc"
    assert store_facts("someone/model")["model"] == "someone/model@abc"


def test_where_features_are_kept(tmp_path, monkeypatch):
    assert cache_folder(False) is None
    assert cache_folder("false") is None
    monkeypatch.setenv("TORCHRL_MAXMIN_CACHE", str(tmp_path / "ours"))
    assert cache_folder(True) == cache_folder("true") == tmp_path / "ours"
    assert cache_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"features cannot be kept in .*give --feature_cache another"):
        cache_folder(str(tmp_path / "file"))
    monkeypatch.delenv("TORCHRL_MAXMIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(True) == tmp_path / "home/.cache/torchrl_maxmin/features"
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder(True) is None


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """Twelve users, 24 pairs of eight texts."""
    texts = ["the film", "was great", "was long", "its cast", "dull cast", "was", "great cast", "a film"]
    rows = [
        {"prompt": "the", "chosen": texts[i % 8], "rejected": texts[(i + 1 + i // 8) % 8], "user_id": i % 12}
        for i in range(48)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parsed(config_class, *words):
    return parse_config("verb", "a line", config_class, words)


@pytest.fixture
def batches_read(monkeypatch):
    read = []
    batches = features.feature_batches

    def noted(model, rows, *arguments, **options):
        read.append(len(rows))
        return batches(model, rows, *arguments, **options)

    monkeypatch.setattr(features, "feature_batches", noted)
    return read


def test_the_next_run_reads_nothing_and_finds_the_same(path, tiny_model, tmp_path, batches_read):
    data, cache = PreferenceDataset.load(str(path)), tmp_path / "cache"
    fresh = raw_differences(data, range(48), tiny_model, None, "cpu")
    first, second = (raw_differences(data, range(48), tiny_model, None, "cpu", cache=cache) for _ in range(2))
    assert torch.equal(first, fresh)
    assert torch.equal(second, fresh)
    assert batches_read == [8, 8]
    raw_differences(data, range(48), tiny_model, None, "cpu", cache=cache, pooling="mean")
    raw_differences(data, range(48), tiny_model, None, "cpu", cache=cache, dtype=torch.bfloat16)
    assert batches_read == [8, 8, 8, 8]
    (whole, *_) = sorted(cache.glob("*/*.safetensors"), key=os.path.getsize)
    whole.write_bytes(whole.read_bytes()[:-1])
    for _ in range(2):
        raw_differences(data, range(48), tiny_model, None, "cpu", cache=cache, dtype=torch.bfloat16)
    assert batches_read == [8, 8, 8, 8, 8]


def test_new_texts_alone_are_read(path, tiny_model, tmp_path, batches_read):
    data, cache = PreferenceDataset.load(str(path)), tmp_path / "cache"
    raw_differences(data, [0, 1], tiny_model, None, "cpu", cache=cache)
    every = raw_differences(data, range(48), tiny_model, None, "cpu", cache=cache)
    assert batches_read[0] < 8
    assert sum(batches_read) == 8
    torch.testing.assert_close(every, raw_differences(data, range(48), tiny_model, None, "cpu"))


def test_stages_share_the_cache(path, tiny_model, tmp_path, batches_read):
    """A second diagnosis, and a reward model of the same pairs, read no text for features."""
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", str(path), "--device", "cpu"]
    flags += ["--feature_cache", str(tmp_path / "cache"), "--max_groups", "2"]
    quick = ["--num_jackknife", "0", "--num_bootstrap", "0", "--l2", "0.01"]

    def diagnosed(name):
        out = ["--output_dir", str(tmp_path / name)]
        folder = run_diagnose(parsed(DiagnoseConfig, *flags, *quick, *out))
        return (folder / "users.csv").read_text()

    assert diagnosed("one") == diagnosed("two")
    assert batches_read == [8]
    rewards = ["--num_groups", "2", "--num_rounds", "1", "--steps_per_round", "1", "--calibration", "none"]
    config = parsed(RewardConfig, *flags, *rewards, "--output_dir", str(tmp_path / "r"))
    run_reward(config)
    assert batches_read == [8]


def test_flags_of_the_cache(tmp_path):
    flags = ["--dataset_name", "d", "--model_name_or_path", "m", "--output_dir", "o"]
    yaml = tmp_path / "config.yaml"
    yaml.write_text("feature_cache: false\nfeature_dtype: bfloat16\n")
    config = parsed(DiagnoseConfig, *flags, "--config", str(yaml))
    assert config.feature_options() == {"cache": None, "dtype": torch.bfloat16}
    config = parsed(DiagnoseConfig, *flags, "--feature_cache", "false")
    assert config.feature_options() == {"cache": None, "dtype": torch.float32}
    config = parsed(DiagnoseConfig, *flags, "--feature_dtype", "float16")
    with pytest.raises(UserError, match="--feature_dtype 'float16' is none of float32, bfloat16"):
        config.check()
