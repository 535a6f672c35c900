"""Reward models inside TorchRL: the tensors of a rollout in, one reward a group out."""

import pytest
import torch
from rewards_models import COMPLETIONS, PROMPTS, chat_tokenizer, save_decoder, save_encoder
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict.nn import TensorDictSequential

from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.models.sequences import pad_left, pad_right
from torchrl_maxmin.rewards import Calibration, RewardMixture
from torchrl_maxmin.rewards.source import RewardModule

CHAT = chat_tokenizer()
FULL = (("tokens", "full"), ("masks", "all_attention_mask"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module", params=["decoder", "encoder", "adapters"])
def mixture(request, llama, tmp_path_factory):
    torch.manual_seed(0)
    folder = save_encoder(tmp_path_factory.mktemp("models") / "bert") if request.param == "encoder" else llama
    made = RewardMixture.from_backbone(folder, 3, use_peft=request.param == "adapters")
    made.calibration = Calibration.fit(2 * torch.randn(20, 4, 3) + 1)
    return made


def responses():
    prompt, prompt_mask = pad_left([CHAT(p).input_ids for p in PROMPTS], CHAT.pad_token_id)
    rows = [[*CHAT(c, add_special_tokens=False).input_ids, CHAT.eos_token_id] for c in COMPLETIONS]
    action, action_mask = pad_right(rows, CHAT.pad_token_id)
    keys = {"prompt_tokens": prompt, "prompt_mask": prompt_mask, "action": action, "action_mask": action_mask}
    return TensorDict(keys, [len(PROMPTS)])


@pytest.mark.parametrize("calibrated", [False, True])
def test_rewards_of_responses_are_the_scores_of_their_texts(mixture, calibrated):
    batch = RewardModule(mixture, CHAT, calibrated=calibrated)(responses())
    expected = mixture.score(PROMPTS, COMPLETIONS, calibrated=calibrated)
    assert batch["next", "reward"].shape == (8, 3)
    torch.testing.assert_close(batch["next", "reward"], expected, atol=1e-5, rtol=1e-5)


def test_any_batch_shape_and_key(mixture):
    module = RewardModule(mixture, CHAT, out_key="reward")
    flat = module(responses())["reward"]
    shaped = module(responses().reshape(2, 4))
    assert shaped["reward"].shape == (2, 4, 3)
    torch.testing.assert_close(shaped["reward"].reshape(8, 3), flat, atol=1e-5, rtol=1e-5)
    assert module.in_keys == ["prompt_tokens", "prompt_mask", "action", "action_mask"]
    assert module.out_keys == ["reward"]


@pytest.mark.parametrize("shape", [(8,), (2, 4), (8, 1)])
def test_prompts_and_ends_are_the_datas_and_the_policys_own(tmp_path, shape):
    """Not what the tokens read back as, and an end of a turn is no part of the text."""
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(save_decoder(tmp_path / "llama"), 2, layout="concat")  # texts
    turn_end = CHAT.convert_tokens_to_ids("twice")
    batch = responses()
    batch["action"] = batch["action"].masked_fill(batch["action"] == CHAT.eos_token_id, turn_end)
    batch["action_mask"][2, COMPLETIONS[2].count(" ") + 1 :] = False  # cut off
    batch["prompt_index"] = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
    asked = [f"{prompt} at home" for prompt in PROMPTS]
    module = RewardModule(mixture, CHAT, calibrated=False, prompts=asked, eos_token_ids=[turn_end])
    written = [
        CHAT.decode(row[mask]) for row, mask in zip(batch["action"], batch["action_mask"], strict=True)
    ]
    order = batch["prompt_index"].tolist()
    ended = [
        int(row[mask][-1]) == turn_end
        for row, mask in zip(batch["action"], batch["action_mask"], strict=True)
    ]
    assert ended == [i != 2 for i in range(8)]
    expected = mixture.score([asked[i] for i in order], written, ended=ended)
    shaped = batch.reshape(shape)
    if shape == (8, 1):
        shaped["prompt_index"] = shaped["prompt_index"][..., None]
    rewards = module(shaped)["next", "reward"]
    torch.testing.assert_close(rewards.reshape(8, 2), expected, atol=1e-5, rtol=1e-5)
    for known in ({"prompts": asked}, {"eos_token_ids": [turn_end]}):  # each makes a difference
        other = RewardModule(mixture, CHAT, calibrated=False, **known)(shaped)["next", "reward"]
        assert not torch.allclose(other, rewards, atol=1e-2)


def test_after_a_policy_in_a_sequence(mixture, llama):
    torch.manual_seed(0)
    policy = TokenPolicy.from_pretrained(llama, chat_tokenizer(), max_new_tokens=5)
    batch = TensorDictSequential(policy, RewardModule(mixture, CHAT))(encode_prompts(CHAT, PROMPTS))
    assert batch["next", "reward"].shape == (8, 3)
    assert not batch["next", "reward"].requires_grad


def test_keys_of_torchrls_language_models(llama):
    """Ragged whole texts, as its collectors stack them."""
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(llama, 2)
    rows = mixture.reader.encode(PROMPTS, COMPLETIONS)
    ragged = LazyStackedTensorDict(
        *[
            TensorDict(
                {
                    "tokens": {"full": torch.tensor(r)},
                    "masks": {"all_attention_mask": torch.ones(len(r)).bool()},
                }
            )
            for r in rows
        ]
    )
    expected = mixture.score(PROMPTS, COMPLETIONS)
    module = RewardModule(mixture, mixture.tokenizer, in_keys=FULL, out_key="reward")
    torch.testing.assert_close(module(ragged)["reward"], expected, atol=1e-5, rtol=1e-5)
    tokens, mask = pad_left(rows, 3)
    padded = TensorDict({"tokens": {"full": tokens}, "masks": {"all_attention_mask": mask.long()}}, [8])
    torch.testing.assert_close(module(padded)["reward"], expected, atol=1e-5, rtol=1e-5)


def test_mistakes(mixture, tokenizer):
    with pytest.raises(ValueError, match="tokens and mask"):
        RewardModule(mixture, CHAT, in_keys=["action"])
    with pytest.raises(ValueError, match="own vocabulary"):
        RewardModule(mixture, tokenizer, in_keys=FULL)
