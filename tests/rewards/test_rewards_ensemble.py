"""Reward models that users bring, each with its own tokenizer and layout, as one model of K groups."""

import json

import pytest
import torch
from rewards_models import COMPLETIONS, PROMPTS, bert_tokenizer, chat_tokenizer, save_decoder, save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rewards import Calibration, RewardMixture
from torchrl_maxmin.rewards.ensemble import RewardEnsemble, SequenceClassifier, load_reward_model
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.welfare import HardMin

MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    made = {
        "bert": save_encoder(root / "bert", num_labels=1),
        "deberta": save_encoder(root / "deberta", "deberta-v2", num_labels=1),
        "roberta": save_encoder(root / "roberta", "roberta", num_labels=2),
        "llama": save_decoder(root / "llama", num_labels=1),
        "pad is eos": save_decoder(root / "pad", "llama", chat_tokenizer("</s>"), num_labels=1),
        "no pad": save_decoder(root / "nopad", "gpt2", chat_tokenizer(None), num_labels=1),
        "three": save_decoder(root / "three", "mistral", num_labels=3),
        "causal": save_decoder(root / "causal", "llama"),
    }
    return made


@pytest.fixture(scope="module")
def ensemble(folders):
    names = [folders[name] for name in ("bert", "llama", "roberta", "three")]
    ensemble = RewardEnsemble.from_pretrained(
        names, layouts=["text_pair", "chat", "response", "auto"], labels=[None, None, 1, None]
    )
    ensemble.calibration = Calibration.fit(
        2 * torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(0))
    )
    return ensemble


def by_transformers(folder, texts):
    """Logits of texts alone by transformers; a text is what the tokenizer takes, or token ids."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([text])).logits
                if isinstance(text[0], int)
                else model(**tokenizer(*([part] for part in text), return_tensors="pt")).logits
                for text in texts
            ]
        )


def test_columns_are_the_models_own_logits(ensemble, folders):
    chat = chat_tokenizer()
    turns = [
        chat.apply_chat_template((user if p else []) + answer, tokenize=False)
        for p, user, answer in zip(PROMPTS, MESSAGES, ANSWERS, strict=True)
    ]
    expected = [
        by_transformers(
            folders["bert"], [(p, c) if p else (c,) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        ),
        by_transformers(folders["llama"], [chat(t, add_special_tokens=False).input_ids for t in turns]),
        by_transformers(folders["roberta"], [(c,) for c in COMPLETIONS])[:, 1:],
        by_transformers(
            folders["three"],
            [[*chat(p + c).input_ids, chat.eos_token_id] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)],
        ),
    ]
    scores = ensemble.score(PROMPTS, COMPLETIONS)
    assert ensemble.num_groups == scores.shape[1] == 6
    torch.testing.assert_close(scores, torch.cat(expected, -1), atol=1e-5, rtol=1e-5)
    assert scores.std(0).min() > 0.01


@pytest.mark.parametrize("name", ["bert", "deberta", "roberta", "llama", "pad is eos", "no pad", "three"])
def test_scores_depend_on_neither_batch_nor_order(folders, name):
    one = RewardEnsemble.from_pretrained([folders[name]])
    alone = one.score(PROMPTS, COMPLETIONS, batch_size=1)
    many = one.score(PROMPTS[::-1] * 8, COMPLETIONS[::-1] * 8, batch_size=64)
    torch.testing.assert_close(many, alone.flip(0).repeat(8, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one(PROMPTS, COMPLETIONS).detach(), alone, atol=1e-5, rtol=1e-5)


def test_pad_equal_to_eos_reads_the_score_at_eos(folders):
    """Where transformers, told to pad with EOS, reads the token before it."""
    chat = chat_tokenizer("</s>")
    rows = [[*chat(p + c).input_ids, chat.eos_token_id] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    model = AutoModelForSequenceClassification.from_pretrained(folders["pad is eos"]).eval()
    with torch.no_grad():
        at_end = torch.cat(
            [model.score(model.model(torch.tensor([row])).last_hidden_state[:, -1]) for row in rows]
        )
    found = RewardEnsemble.from_pretrained([folders["pad is eos"]]).score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found, at_end, atol=1e-5, rtol=1e-5)


def test_conversations_go_to_each_model_in_its_own_way(ensemble, folders):
    scores = ensemble.score(MESSAGES[:2], ANSWERS[:2])
    llama, three = (RewardEnsemble.from_pretrained([folders[n]], layouts="chat") for n in ("llama", "three"))
    transcripts = [f"\n\nHuman: {prompt}\n\nAssistant:" for prompt in PROMPTS[:2]]
    bert = RewardEnsemble.from_pretrained([folders["bert"]], layouts="text_pair")
    torch.testing.assert_close(scores[:, 1:2], llama.score(PROMPTS[:2], COMPLETIONS[:2]))
    torch.testing.assert_close(scores[:, 3:], three.score(PROMPTS[:2], COMPLETIONS[:2]))
    torch.testing.assert_close(scores[:, :1], bert.score(transcripts, [f" {c}" for c in COMPLETIONS[:2]]))
    assert ensemble.reward_fn(group=3)(prompts=MESSAGES, completions=ANSWERS) == pytest.approx(
        ensemble.score(MESSAGES, ANSWERS, calibrated=True)[:, 3].tolist()
    )


def test_save_and_load_are_identical(ensemble, tmp_path):
    ensemble.log_prior.copy_(torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]).log())
    ensemble.save_pretrained(tmp_path / "kept")
    again = load_reward_model(tmp_path / "kept")
    assert isinstance(again, RewardEnsemble)
    for calibrated in (False, True):
        expected = ensemble.score(PROMPTS, COMPLETIONS, calibrated=calibrated)
        assert torch.equal(again.score(PROMPTS, COMPLETIONS, calibrated=calibrated), expected)
    torch.testing.assert_close(again.log_prior, ensemble.log_prior)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept" / "member_1")


def test_a_json_file_names_the_models(folders, tmp_path):
    members = [folders["bert"], {"name_or_path": folders["roberta"], "layout": "response", "label": 0}]
    (tmp_path / "mine.json").write_text(json.dumps({"members": members, "prior": [3, 1]}))
    ensemble = load_reward_model(tmp_path / "mine.json")
    torch.testing.assert_close(ensemble.log_prior.exp(), torch.tensor([0.75, 0.25]))
    expected = by_transformers(folders["roberta"], [(c,) for c in COMPLETIONS])[:, 0]
    torch.testing.assert_close(ensemble.score(PROMPTS, COMPLETIONS)[:, 1], expected, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_texts(folders):
    ensemble = RewardEnsemble.from_pretrained([folders["bert"], folders["llama"]])
    ensemble(PROMPTS, COMPLETIONS, calibrated=True)[:, 1].sum().backward()
    for index, moved in enumerate((False, True)):
        grads = [p.grad for p in ensemble.members[index].parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == moved


def test_an_adversary_follows_the_worst_model(ensemble):
    scores = ensemble.score(PROMPTS, COMPLETIONS, calibrated=True)
    values = ensemble.reward_fn(adversary=HardMin(6))(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(torch.tensor(values), scores[:, scores.mean(0).argmin()], atol=1e-5, rtol=1e-5)


def test_responses_of_a_policy_travel_as_text(ensemble, tokenizer):
    from tensordict import TensorDict

    from torchrl_maxmin.models.sequences import pad_left, pad_right

    prompt, prompt_mask = pad_left([tokenizer(p).input_ids for p in PROMPTS], tokenizer.pad_token_id)
    rows = [tokenizer(c, add_special_tokens=False).input_ids for c in COMPLETIONS]
    ended = [i % 2 == 0 for i in range(len(rows))]  # one that was cut off is given no end
    rows = [[*row, *[tokenizer.eos_token_id] * end] for row, end in zip(rows, ended, strict=True)]
    action, action_mask = pad_right(rows, tokenizer.pad_token_id)
    keys = {"prompt_tokens": prompt, "prompt_mask": prompt_mask, "action": action, "action_mask": action_mask}
    source = MixtureRewards(ensemble, tokenizer)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    texts = [tokenizer.decode(tokenizer(p).input_ids[1:]) for p in PROMPTS], decoded
    expected = ensemble.score(*texts, ended=ended)
    torch.testing.assert_close(source(TensorDict(keys, [8])), expected)
    assert not torch.allclose(expected, ensemble.score(*texts))
    assert source.num_groups == 6


# -- peft adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Folders of one-output classifiers as adapters on a language model; one of them lost its head."""
    import peft

    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for name, kept in (("whole", ["score"]), ("headless", None)):
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(folders["causal"], num_labels=1)
        base.config.pad_token_id = 3
        task = "SEQ_CLS" if kept else "FEATURE_EXTRACTION"
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type=task, modules_to_save=kept)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.5)
        model.save_pretrained(root / name)
        made[name] = str(root / name), model
    return made


def test_a_peft_folder_is_a_reward_model(adapters, folders, tmp_path):
    folder, model = adapters["whole"]
    chat = chat_tokenizer()
    rows = [[*chat(p + c).input_ids, chat.eos_token_id] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    ensemble = load_reward_model(folder)
    assert ensemble.num_groups == 1
    torch.testing.assert_close(ensemble.score(PROMPTS, COMPLETIONS), expected, atol=1e-5, rtol=1e-5)
    ensemble.save_pretrained(tmp_path)
    again = RewardEnsemble.from_pretrained(tmp_path)
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), ensemble.score(PROMPTS, COMPLETIONS))


def test_an_adapter_without_its_head_is_refused(adapters):
    with pytest.raises(UserError, match="without its reward head"):
        RewardEnsemble.from_pretrained([adapters["headless"][0]])


# -- the name that a user gives ----------------------------------------------------------------------


def test_load_reward_model_by_what_lies_there(folders, tmp_path):
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(folders["causal"], 2)
    mixture.save_pretrained(tmp_path / "mixture")
    loaded = load_reward_model(tmp_path / "mixture")
    assert isinstance(loaded, RewardMixture)
    assert isinstance(load_reward_model(folders["bert"]), RewardEnsemble)
    both = RewardEnsemble.from_pretrained([str(tmp_path / "mixture"), folders["bert"]])
    expected = torch.cat(
        [m.score(PROMPTS, COMPLETIONS) for m in (mixture, load_reward_model(folders["bert"]))], -1
    )
    assert torch.equal(both.score(PROMPTS, COMPLETIONS), expected)
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(load_reward_model(tmp_path / "both").score(PROMPTS, COMPLETIONS), expected)


def test_mistakes(folders, tmp_path):
    load = RewardEnsemble.from_pretrained
    with pytest.raises(UserError, match="holds no reward head"):
        load([folders["causal"]])
    with pytest.raises(UserError, match="no label 2 among the 2"):
        load([folders["roberta"]], labels=[2])
    with pytest.raises(UserError, match="2 models, 1 layouts and 2 labels"):
        load([folders["bert"]] * 2, layouts=["auto"])
    with pytest.raises(UserError, match="prior must be 1 positive shares"):
        load([folders["bert"]], prior=[0.5, 0.5])
    with pytest.raises(UserError, match="one reward model at least"):
        load([])
    with pytest.raises(UserError, match="no model at"):
        load_reward_model("no/such-model")
    with pytest.raises(UserError, match="chat template"):
        load([folders["bert"]], layouts="chat")
    (tmp_path / "bad.json").write_text('{"models": []}')
    for source in (tmp_path / "bad.json", folders["bert"], tmp_path / "none.json"):
        with pytest.raises(UserError, match="is no ensemble"):
            load(source)
    mixture = RewardMixture.from_backbone(folders["causal"], 2)
    mixture.save_pretrained(tmp_path / "mixture")
    with pytest.raises(UserError, match="its own layout"):
        load([str(tmp_path / "mixture")], layouts="chat")


def test_a_classifier_without_a_pad_token_takes_batches(folders, tmp_path):
    folder = save_encoder(tmp_path, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    SequenceClassifier(model, bert_tokenizer())
    assert model.config.pad_token_id == 0
