"""Policy, scorer and critic against plain transformers on text without padding."""

import copy

import pytest
import torch
from rounding import SAMPLER, TINY_MODEL, log_prob_bar
from tensordict import TensorDict
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from torchrl_maxmin.models import TokenCritic, TokenPolicy, TokenScorer, predicting_states
from torchrl_maxmin.models.loading import ensure_pad_token, load_causal_lm
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.models.sequences import mask_after_eos, pad_left, pad_right

PAD, BOS, EOS = 0, 1, 2
PROMPTS = [[BOS, 10, 11, 12, 13, 14], [BOS], [BOS, 20, 21]]
# the second emits the pad token before it ends, the third never ends
ACTIONS = [[30, 31, EOS], [40, PAD, PAD, 41, EOS], [50, 51, 52, 53, 54]]


def make_policy(folder, temperature=1.0, width=5):
    return TokenPolicy(
        load_causal_lm(folder),
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_new_tokens=width,
        temperature=temperature,
    )


def make_batch(prompts=PROMPTS, actions=ACTIONS, left=0, right=0):
    """Prompts padded left and actions padded right, with extra columns of padding."""
    tokens, mask = pad_left(prompts, PAD)
    action, action_mask = pad_right(actions, PAD)
    pad = torch.nn.functional.pad
    return TensorDict(
        {
            "prompt_tokens": pad(tokens, (left, 0)),
            "prompt_mask": pad(mask, (left, 0)),
            "action": pad(action, (0, right)),
            "action_mask": pad(action_mask, (0, right)),
        },
        [len(prompts)],
    )


def plain_scores(model, prompt, action, temperature):
    """Log-probabilities and entropies of one unpadded response by the whole logits, in float64."""
    logits = model(input_ids=torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits.double() / temperature).log_softmax(-1)
    chosen = log_probs[torch.arange(len(action)), torch.tensor(action)]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_plain_transformers_on_unpadded_text(tiny_model, temperature):
    policy = make_policy(tiny_model, temperature)
    batch = make_batch()
    with torch.no_grad():
        log_prob, entropy = policy.log_prob_and_entropy(batch)
        for i, (prompt, action) in enumerate(zip(PROMPTS, ACTIONS, strict=True)):
            expected, expected_entropy = plain_scores(policy.model, prompt, action, temperature)
            real = len(action)
            torch.testing.assert_close(log_prob[i, :real].double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropy[i, :real].double(), expected_entropy, atol=1e-5, rtol=1e-5)
            assert (log_prob[i, real:] == 0).all()
            assert (entropy[i, real:] == 0).all()
    assert (log_prob[1, 1:3] < 0).all()  # the emitted pad tokens count as what they are: actions


def test_scores_do_not_depend_on_padding_or_batch(tiny_model):
    policy = make_policy(tiny_model)
    critic = TokenCritic(copy.deepcopy(policy.model.transformer), 3)
    torch.nn.init.normal_(critic.head.weight)
    whole = make_batch()
    wide = make_batch(left=4, right=3)
    with torch.no_grad():
        expected, values = policy.log_prob(whole), critic(whole)["state_value"]
        torch.testing.assert_close(policy.log_prob(wide)[:, :5], expected, atol=1e-5, rtol=1e-5)
        assert (policy.log_prob(wide)[:, 5:] == 0).all()
        real = whole["action_mask"]
        wide_values = critic(wide)["state_value"][:, :5]
        torch.testing.assert_close(wide_values[real], values[real], atol=1e-5, rtol=1e-5)
        for i in range(3):
            alone = make_batch(PROMPTS[i : i + 1], ACTIONS[i : i + 1])
            size = len(ACTIONS[i])
            torch.testing.assert_close(policy.log_prob(alone)[0], expected[i, :size], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                critic(alone)["state_value"][0], values[i, :size], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_log_probs_are_those_of_training_and_of_plain_transformers(tiny_model, temperature, dtype):
    policy = make_policy(tiny_model, temperature, width=12).to(dtype)
    tokens, mask = pad_left(PROMPTS * 60, PAD)
    torch.manual_seed(0)
    batch = policy(TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [len(tokens)]))
    action, action_mask = batch["action"], batch["action_mask"]
    assert action.shape == action_mask.shape == batch["sample_log_prob"].shape == (180, 12)
    scored = TokenScorer(policy)(
        batch.select("prompt_tokens", "prompt_mask", "action", "action_mask").clone()
    )
    # the sampler reads cached keys, the scorer whole sequences; its scores are float32 whatever the model is
    assert batch["sample_log_prob"].dtype == torch.float32
    bar = log_prob_bar(policy.model, TINY_MODEL if dtype == torch.float32 else SAMPLER, temperature)
    found = scored["log_prob"].detach().float()
    torch.testing.assert_close(found, batch["sample_log_prob"], atol=bar, rtol=0)
    for i in range(30):
        row = action[i][action_mask[i]].tolist()
        with torch.no_grad():
            expected, _ = plain_scores(policy.model, PROMPTS[i % 3], row, temperature)
        torch.testing.assert_close(
            batch["sample_log_prob"][i][action_mask[i]].double(), expected, atol=1e-5, rtol=1e-5
        )
    # every response is full or ends in its first EOS, and nothing but padding follows
    torch.testing.assert_close(action_mask, mask_after_eos(action, EOS))
    lengths = action_mask.sum(-1)
    last = action[torch.arange(180), lengths - 1]
    assert ((lengths == 12) | (last == EOS)).all()
    assert (lengths < 12).any()
    assert (action[~action_mask] == PAD).all()
    emitted_pad = (action == PAD) & action_mask
    assert emitted_pad.any()
    assert (batch["sample_log_prob"][emitted_pad] < 0).all()


def first_token_statistics(policy, temperature):
    """Sampled first tokens against the exact distribution: z-score of the surprise, total variation."""
    tokens = torch.tensor([[BOS, 10]]).expand(3000, 2)
    batch = policy(
        TensorDict({"prompt_tokens": tokens, "prompt_mask": torch.ones_like(tokens).bool()}, [3000])
    )
    with torch.no_grad():
        exact = (policy.model(input_ids=tokens[:1]).logits[0, -1] / temperature).softmax(-1)
    information = -exact.log()
    mean = (exact * information).sum()
    std = ((exact * (information - mean) ** 2).sum() / 3000).sqrt()
    frequency = batch["action"][:, 0].bincount(minlength=len(exact)) / 3000
    sampled = (frequency * information).sum()
    return ((sampled - mean) / std).abs().item(), 0.5 * (frequency - exact).abs().sum().item()


@pytest.mark.parametrize("source", ["folder", "model"])
def test_generation_config_of_a_model_does_not_leak_into_sampling(make_model, source):
    folder = make_model(f"opinionated_{source}")
    opinions = {
        "do_sample": True,
        "top_k": 3,
        "min_p": 0.3,
        "temperature": 0.2,
        "repetition_penalty": 4.0,
        "min_new_tokens": 3,
    }
    GenerationConfig(**opinions, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(folder)
    model = load_causal_lm(folder) if source == "folder" else GPT2LMHeadModel.from_pretrained(folder).eval()
    policy = TokenPolicy(model, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=2, temperature=0.7)
    torch.manual_seed(0)
    z, variation = first_token_statistics(policy, 0.7)
    assert z < 4
    assert variation < 0.1


def test_sampling_follows_the_seed(tiny_model):
    policy = make_policy(tiny_model)
    prompts = make_batch().select("prompt_tokens", "prompt_mask")
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(policy(prompts.clone())["action"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_pad_must_not_be_eos(tiny_model):
    with pytest.raises(ValueError, match="pad_token_id equals eos_token_id"):
        TokenPolicy(load_causal_lm(tiny_model), eos_token_id=2, pad_token_id=2, max_new_tokens=3)


def always(token, eos=2):
    """A model that always says one token, and whose generation_config knows two ends, 2 and 3."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=eos
        )
    ).eval()
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0)
    with torch.no_grad():
        for parameter in (model.transformer.wte.weight, model.transformer.wpe.weight):
            parameter.zero_()
        model.transformer.wte.weight[token] = 5.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
    return model


@pytest.mark.parametrize("token", [2, 3, 4])
def test_every_end_token_of_the_model_ends_a_response_and_survives_saving(token, tmp_path):
    model = always(token)
    prompts = TensorDict(
        {"prompt_tokens": torch.tensor([[1, 4]]), "prompt_mask": torch.ones(1, 2).bool()}, [1]
    )
    policy = TokenPolicy(model, eos_token_id=2, pad_token_id=0, max_new_tokens=6)
    assert policy.eos_token_ids == (2, 3)
    batch = policy(prompts.clone())
    real = 6 if token == 4 else 1
    assert batch["action"].tolist() == [[token] * real + [0] * (6 - real)]
    assert batch["action_mask"].sum() == real
    policy.model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 3]
    again = load_causal_lm(str(tmp_path))  # and again, by the package's own loading
    again.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 3]


def test_ends_that_are_given_come_first_and_one_end_stays_a_number(tmp_path):
    assert TokenPolicy(always(4), eos_token_id=[5, 3], pad_token_id=0, max_new_tokens=2).eos_token_ids == (
        5,
        3,
        2,
    )
    model = always(4)
    model.generation_config = GenerationConfig(eos_token_id=2)
    TokenPolicy(model, eos_token_id=2, pad_token_id=0, max_new_tokens=2).model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


def test_pad_must_differ_from_every_end():
    with pytest.raises(ValueError, match=r"pad_token_id equals eos_token_id \(3\)"):
        TokenPolicy(always(4), eos_token_id=2, pad_token_id=3, max_new_tokens=2)


def test_a_pad_token_that_is_one_of_the_ends_is_replaced(tiny_model):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load_causal_lm(tiny_model)
    model.generation_config.eos_token_id = [EOS, tokenizer.pad_token_id]
    ensure_pad_token(tokenizer, model)
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == model.config.pad_token_id


@pytest.mark.parametrize("rows", [[[], [4, 5]], [[], []]])
def test_a_prompt_without_tokens_is_refused(tiny_model, rows):
    policy = make_policy(tiny_model)
    tokens, mask = pad_left(rows, PAD)
    prompts = TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [2])
    with pytest.raises(ValueError, match=r"a prompt without tokens.* give it the tokenizer's BOS"):
        policy(prompts.clone())
    given = prompts.update(make_batch().select("action", "action_mask")[:2])
    with pytest.raises(ValueError, match="a prompt without tokens"):
        policy.log_prob(given)


def test_dropout_is_off(make_model):
    folder = make_model("dropout", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy = make_policy(folder)
    batch = make_batch()
    assert torch.equal(policy.log_prob(batch), policy.log_prob(batch))
    critic = TokenCritic(copy.deepcopy(policy.model.transformer), 2)
    torch.nn.init.normal_(critic.head.weight)
    first, second = (critic(batch.clone())["state_value"] for _ in range(2))
    assert torch.equal(first, second)


def test_critic_starts_at_zero_and_reads_the_state_before_each_token(tiny_model):
    trunk = load_causal_lm(tiny_model).transformer
    critic = TokenCritic(trunk, 3)
    batch = critic(make_batch(right=2))
    assert batch["state_value"].shape == (3, 7, 3)
    assert batch["state_value"].dtype == torch.float32
    assert (batch["state_value"] == 0).all()
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        values = critic(make_batch())["state_value"]
        states = predicting_states(trunk, make_batch())
        for i, (prompt, action) in enumerate(zip(PROMPTS, ACTIONS, strict=True)):
            alone = trunk(input_ids=torch.tensor([prompt + action])).last_hidden_state[0]
            alone = alone[len(prompt) - 1 : -1]
            torch.testing.assert_close(states[i, : len(action)], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[i, : len(action)], critic.head(alone), atol=1e-5, rtol=1e-5)


def test_gradients_through_the_scorer_equal_autograd_through_full_logits(tiny_model):
    policy = make_policy(tiny_model, temperature=0.7)
    batch = make_batch()
    coefficients = torch.randn(3, 5)
    scored = TokenScorer(policy, entropy=True)(batch.clone())
    (scored["log_prob"] * coefficients + 0.3 * scored["entropy"]).sum().backward()

    plain = GPT2LMHeadModel.from_pretrained(tiny_model).eval()
    total = torch.zeros((), dtype=torch.float64)
    for i, (prompt, action) in enumerate(zip(PROMPTS, ACTIONS, strict=True)):
        log_prob, entropy = plain_scores(plain, prompt, action, 0.7)
        total = total + (log_prob * coefficients[i, : len(action)] + 0.3 * entropy).sum()
    total.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    assert max(g.abs().max() for g in expected.values()) > 0.1


def test_scorer_leaves_entropy_out_unless_asked(tiny_model):
    policy = make_policy(tiny_model)
    assert "entropy" not in TokenScorer(policy)(make_batch())
    assert TokenScorer(policy, entropy=True).out_keys == ["log_prob", "entropy"]


def test_sample_responses_repeats_prompts_side_by_side(tiny_model, tokenizer):
    policy = make_policy(tiny_model)
    prompts = encode_prompts(tokenizer, ["the film", "we loved the long story"])
    torch.manual_seed(0)
    out = sample_responses(policy, prompts, num_samples=3, batch_size=4)
    assert out.batch_size == (6,)
    for i in range(6):
        assert torch.equal(out["prompt_tokens"][i], prompts["prompt_tokens"][i // 3])
    assert len({tuple(row) for row in out["action"][:3].tolist()}) > 1
    texts, completions = to_texts(tokenizer, out)
    assert texts == ["the film"] * 3 + ["we loved the long story"] * 3
    for row, mask, text in zip(out["action"], out["action_mask"], completions, strict=True):
        words = [t for t in row[mask].tolist() if t > 2]  # without <pad>, <bos>, <eos>
        assert len(text.split()) == len(words) - words.count(tokenizer.unk_token_id)


def test_encode_prompts_cuts_the_start(tokenizer):
    out = encode_prompts(tokenizer, ["the film was great", "it"], max_length=2)
    assert out["prompt_tokens"].tolist() == [tokenizer("great").input_ids, tokenizer("it").input_ids]
    assert out["prompt_mask"].all()
    assert out["prompt_index"].tolist() == [0, 1]


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_ensure_pad_token_makes_one_of_its_own(make_model, pad_token):
    from transformers import AutoTokenizer

    folder = make_model(f"padless_{pad_token}".replace("<", "").replace(">", ""))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad_token
    model = load_causal_lm(folder)
    rows = model.get_input_embeddings().num_embeddings
    ensure_pad_token(tokenizer, model)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.get_input_embeddings().num_embeddings == rows + 1 == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_ensure_pad_token_needs_an_eos(tiny_model):
    from transformers import AutoTokenizer

    from torchrl_maxmin.core.errors import UserError

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        ensure_pad_token(tokenizer, load_causal_lm(tiny_model))


def test_missing_models(tmp_path):
    from torchrl_maxmin.core.errors import UserError

    with pytest.raises(UserError, match=r"folder without config.json"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(UserError, match="no model at 'no/such-model'"):
        load_causal_lm("no/such-model")
