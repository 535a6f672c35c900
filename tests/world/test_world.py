"""The embedded world against its own statement of what it is."""

import json
import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.world import (
    World,
    build_config,
    is_heldout,
    sample_prompts,
    sample_reviews,
)
from torchrl_maxmin.world.grammar import WORDS
from torchrl_maxmin.world.world import write_preferences, write_world


@pytest.mark.parametrize(("name", "scale"), [("10:1", 8.0), ("80:20", 4.0)])
def test_utilities_follow_the_stated_formulas(name, scale):
    reviews = {
        "the film was great": (1, 4),
        "i loved the wonderful film .": (2, 6),
        "a dull film": (-1, 3),
        "it was awful but it was clever": (0, 7),
        "the film was long": (0, 4),
    }
    raw = World.preset(name).raw_utilities(list(reviews))
    expected = [[math.tanh(mood / scale), -words / 10] for mood, words in reviews.values()]
    np.testing.assert_allclose(raw, expected, rtol=1e-12)
    world = World(name, (0.8, 0.2), scale, utility_std=(0.5, 4.0))
    np.testing.assert_allclose(world.utilities(list(reviews)), np.array(expected) / [0.5, 4.0], rtol=1e-12)
    halves = [review.split(" ", 2) for review in reviews]
    split = world([" ".join(h[:2]) for h in halves], [h[2] for h in halves])
    np.testing.assert_allclose(split, world.utilities(list(reviews)))
    assert world.utilities([]).shape == (0, 2)


def test_labels_are_bradley_terry():
    world = World("w", (0.8, 0.2), sentiment_scale=4.0, tau=2.0, utility_std=(0.5, 0.4))
    first, second, n = "a great film", "the awful film was rather long", 20_000
    gap = [(math.tanh(0.25) - math.tanh(-0.25)) / 0.5, (-0.3 + 0.6) / 0.4]
    for group in (0, 1):
        chance = 1 / (1 + math.exp(-2.0 * gap[group]))
        yes = world.label([first] * n, [second] * n, np.full(n, group), seed=3)
        assert abs(yes.mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / n)
        no = world.label([second] * n, [first] * n, np.full(n, group), seed=4)
        assert abs(no.mean() - (1 - chance)) < 4 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.parametrize(
    ("name", "users", "minority"), [("10:1", 330, 30), ("80:20", 300, 60), ("10:1", 3, 1)]
)
def test_shares_are_exact_and_users_shuffled(name, users, minority):
    world = World.preset(name)
    groups = world.assign_users(users, seed=0)
    assert (len(groups), groups.sum()) == (users, minority)
    assert (groups == world.assign_users(users, seed=0)).all()
    if users > 3:
        assert (groups != world.assign_users(users, seed=1)).any()
        assert (np.diff(groups) != 0).sum() > 2


def test_unknown_world():
    with pytest.raises(UserError, match=r"50:50.*10:1, 80:20"):
        World.preset("50:50")


def test_save_and_load(tmp_path):
    world = World("w", (0.8, 0.2), 4.0, 2.5, (0.3, 0.7))
    world.save(tmp_path / "world.json")
    assert World.load(tmp_path / "world.json") == world


def test_reviews_and_prompts_are_a_function_of_the_seed():
    assert sample_reviews(50, 1) == sample_reviews(50, 1) != sample_reviews(50, 2)
    for prompt, completion in sample_reviews(300, 0):
        words = f"{prompt} {completion}".split()
        assert set(words) <= set(WORDS)
        assert 4 <= len(words) <= 24
        assert 2 <= len(prompt.split()) <= 4
    prompts = sample_prompts(100, 1, heldout=False)
    assert len(set(prompts)) == 100
    assert prompts == sample_prompts(100, 1, heldout=False)


def test_heldout_prompts_never_meet_training_prompts():
    train = {p for seed in range(3) for p in sample_prompts(200, seed, heldout=False)}
    test = {p for seed in range(3) for p in sample_prompts(100, seed, heldout=True)}
    assert not train & test
    share = np.mean([is_heldout(f"prompt {i}") for i in range(5000)])
    assert 0.17 < share < 0.23


def test_tokenizer_round_trip(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "the film was great , but it was long ."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("great", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids("great")
    ]
    assert tokenizer("xylophone").input_ids == [tokenizer.bos_token_id, tokenizer.unk_token_id]
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4
    assert len(tokenizer) == build_config().vocab_size == len(WORDS) + 4
    assert [tokenizer.convert_tokens_to_ids(w) for w in WORDS] == list(range(4, len(WORDS) + 4))


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model):
    """The same world written twice."""
    folders = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        write_world(folder, seed=5, num_texts=60, num_prompts=30, num_test_prompts=15)
        world = write_preferences(
            folder,
            World.preset("80:20"),
            tiny_model,
            5,
            num_users=10,
            pairs_per_user=4,
            test_pairs_per_user=2,
        )
        folders.append((folder, world))
    return folders


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_world_files_are_deterministic(written):
    (one, world), (two, again) = written
    assert world == again == World.load(one / "world.json")
    names = sorted(p.name for p in one.iterdir() if p.is_file())
    assert {"sft.jsonl", "prompts.jsonl", "prompts_test.jsonl", "preferences.jsonl", "world.json"} <= set(
        names
    )
    for name in names:
        assert (one / name).read_text() == (two / name).read_text(), name
    weights = "base_model/model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


def test_test_prompts_occur_in_nothing_that_is_trained_on(written):
    folder, _ = written[0]
    test = {row["prompt"] for row in rows_of(folder / "prompts_test.jsonl")}
    assert len(test) == 15
    for name in ("sft.jsonl", "prompts.jsonl", "preferences.jsonl"):
        assert not test & {row["prompt"] for row in rows_of(folder / name)}, name


def test_preferences_have_the_promised_users_and_truth(written):
    folder, world = written[0]
    train = PreferenceDataset.load(folder / "preferences.jsonl")
    test = PreferenceDataset.load(folder / "preferences_test.jsonl")
    assert train.user_offsets.diff().tolist() == [4] * 10
    assert test.user_offsets.diff().tolist() == [2] * 10
    truth = [world.group_names[g] for g in world.assign_users(10, 5)]
    assert train.user_ids == test.user_ids == [f"user-{i:03d}" for i in range(10)]
    assert train.groups == test.groups == truth
    known = {row["prompt"] for row in rows_of(folder / "prompts.jsonl")}
    assert set(train.prompts + test.prompts) <= known
    assert all(std > 0 for std in world.utility_std)


def test_written_labels_agree_with_the_utilities_of_the_labeller(tmp_path, tiny_model):
    write_world(tmp_path, seed=1, num_texts=5, num_prompts=30, num_test_prompts=5)
    sharp = World("sharp", (0.5, 0.5), 4.0, tau=100.0)
    world = write_preferences(
        tmp_path, sharp, tiny_model, 1, num_users=6, pairs_per_user=10, test_pairs_per_user=0
    )
    data = PreferenceDataset.load(tmp_path / "preferences.jsonl")
    group = np.array([world.group_names.index(data.groups[u]) for u in data.row_users])
    gap = (world(data.prompts, data.chosen) - world(data.prompts, data.rejected))[np.arange(len(data)), group]
    assert (gap >= 0).all()
    assert min((gap > 0)[group == g].mean() for g in (0, 1)) > 0.3  # the rest are ties


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"nme": 1}'])
def test_a_file_that_holds_no_world(tmp_path, content):
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(UserError, match="holds no world"):
        World.load(tmp_path / "world.json")
