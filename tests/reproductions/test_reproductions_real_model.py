"""The real model's script: GGUF to float32, simulated people, and the four verbs on messages in small."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from reproductions_chat import MERGES, TEMPLATE, TOKENS, chat_model, chat_tokenizer
from scripts import load_script
from tensordict import TensorDict
from transformers import LlamaForCausalLM

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.io.files import load_prompts

run = load_script("real_model/run.py")

import chats  # noqa: E402
import scores  # noqa: E402
import smollm2  # noqa: E402
from common import exit_code  # noqa: E402

# -- the model ---------------------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight, heads):
    """Rows of a rotary projection in the order that GGUF keeps them: pairs side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, quantization):
    """Write a tiny Llama as llama.cpp would: norms in float32, matrices quantized."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        kind = quantization if weight.ndim == 2 else "F32"
        stored = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name.replace("model.layers.", "blk."), stored, raw_dtype=raw)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_gguf_becomes_the_model_that_it_was_made_of(tmp_path, quantization):
    model = chat_model()
    write_gguf(tmp_path / "tiny.gguf", model, quantization)
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert found.dtype == torch.float32
    assert found.config.tie_word_embeddings
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        # four bits: 15 steps between the least and the largest of 32 numbers, both kept in float16
        step = torch.zeros(tensor.shape)
        if quantization == "Q4_1" and tensor.ndim == 2:
            blocks = tensor.reshape(-1, 32)
            low, high = blocks.aminmax(dim=-1, keepdim=True)
            bound = (high - low) / 30 + 2**-10 * (high.abs() + low.abs())
            step = bound.expand_as(blocks).reshape(tensor.shape)
        assert ((found.state_dict()[name] - tensor).abs() <= step).all(), name
    if quantization == "F32":
        ids = torch.arange(20)[None]
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_tokenizer_template_and_ends_come_along(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", chat_model(), "F32")
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    found, wanted = load_tokenizer(str(tmp_path / "model")), chat_tokenizer()
    messages = [{"role": "user", "content": "What is the naïve price of\ttea?"}]
    assert (
        found.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        == (wanted.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    )
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 2)
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_greedy_answer_is_the_argmax_of_every_step(tiny_chat_model):
    tokenizer = load_tokenizer(str(tiny_chat_model))
    model = LlamaForCausalLM.from_pretrained(tiny_chat_model, dtype=torch.float64)
    ids = tokenizer("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n").input_ids
    answer = []
    while len(answer) < 6 and answer[-1:] != [2]:
        answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    wanted = tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert smollm2.greedy_answer(tiny_chat_model, "the", 6) == wanted


def test_a_folder_that_is_there_is_left_alone(tiny_chat_model, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "_download", None)
    before = {path: path.stat().st_mtime_ns for path in tiny_chat_model.iterdir()}
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "--output_dir", str(tiny_chat_model)])
    assert smollm2.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(tiny_chat_model))
    assert {path: path.stat().st_mtime_ns for path in tiny_chat_model.iterdir()} == before


@pytest.mark.parametrize("package", ["pip", "gguf"])
def test_a_missing_package_is_one_line(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == package else "there")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "--output_dir", str(tmp_path / "model")])
    assert smollm2.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"the package {package}:" in lines[0]
    assert not (tmp_path / "model").exists()


def test_a_model_that_does_not_know_the_answer_is_not_put_in_its_place(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", chat_model(), "F32")
    monkeypatch.setattr(smollm2, "_download", lambda scratch: tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match="capital of France"):
        smollm2.make(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="GGUF"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "model")


# -- the people --------------------------------------------------------------------------------------------

#: the groups want opposite answers to odd prompts, and the same to even ones
ANSWERS = [
    ["Yes.", f"Certainly, contemporary meteorological observations in {n} places demonstrate variability."]
    if n % 2
    else ["Meteorological observations.", f"No, not at all, in {n} of its ways."]
    for n in range(len(chats.PROMPTS))
]


def test_tastes_are_counted_by_hand():
    worth = chats.tastes(["A cat sat.", "Observations, 42!", ""])
    assert worth == pytest.approx(np.array([[-3, 7 / 3], [-1, 12], [0, 0]]))


def test_prompts_are_distinct_chats_of_all_kinds():
    kinds = {tuple(message["role"] for message in prompt) for prompt in chats.PROMPTS}
    assert kinds == {("user",), ("system", "user"), ("user", "assistant", "user")}
    assert len({json.dumps(prompt) for prompt in chats.PROMPTS}) == len(chats.PROMPTS) == 24


def test_people_choose_by_their_group_and_heldout_prompts_stay_unseen(tmp_path):
    files = chats.write_chats(tmp_path, chats.PROMPTS, ANSWERS)
    assert set(files) == set(chats.FILES)
    data = PreferenceDataset.load(str(files["preferences"]))
    assert len(data.user_ids) == sum(chats.GROUPS.values())
    assert sorted(set(data.groups)) == sorted(chats.GROUPS)
    rows = [json.loads(line) for line in files["preferences"].read_text().splitlines()]
    for k, group in enumerate(chats.GROUPS):
        mine = [row for row in rows if row["group"] == group]
        sides = [[row[side][0]["content"] for row in mine] for side in ("chosen", "rejected")]
        right = chats.tastes(sides[0])[:, k] > chats.tastes(sides[1])[:, k]
        assert right.mean() > 0.9, group
    seen, unseen = (load_prompts(str(files[name]), "train", "ppo")[1] for name in ("prompts", "heldout"))
    assert len(unseen) == 8
    assert not {json.dumps(text) for text in unseen} & {json.dumps(text) for text in seen}
    assert {len(text) for text in unseen} == {1, 2, 3}
    trained = {json.dumps(row["prompt"]) for row in rows}
    assert trained <= {json.dumps(text) for text in seen}


def test_the_same_seed_writes_the_same_files(tmp_path):
    first = chats.write_chats(tmp_path / "a", chats.PROMPTS, ANSWERS)
    again = chats.write_chats(tmp_path / "b", chats.PROMPTS, ANSWERS)
    other = chats.write_chats(tmp_path / "c", chats.PROMPTS, ANSWERS, seed=1)
    for name in chats.FILES:
        assert first[name].read_bytes() == again[name].read_bytes()
    assert first["preferences"].read_bytes() != other["preferences"].read_bytes()


# -- the scores --------------------------------------------------------------------------------------------


def test_a_comparison_names_counts_and_largest_differences():
    responses = TensorDict(
        {
            "action": torch.tensor([[5, 2, 0], [6, 7, 8]]),
            "action_mask": torch.tensor([[True, True, False], [True, True, True]]),
        },
        [2],
    )
    mine = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    other = mine + torch.tensor([[0.0, -0.25], [0.0, 0.0]])
    found = scores.Comparison.make(
        "x",
        responses,
        2,
        ppo=mine,
        evaluate=other,
        transformers=mine.double(),
        transformers_float32=mine + 0.125,
    )
    assert found.summary() == {
        "completions": 2,
        "ended": 1,
        "spread": pytest.approx([2**0.5, 4.5**0.5]),
        "ppo and evaluate": 0.25,
        "ppo and transformers": 0.0,
        "evaluate and transformers": 0.25,
        "float32 and float64": 0.125,
    }
    assert found.alike(0.1)  # two runs of one reading may differ by twice its rounding
    found.scores["transformers_float32"] = mine + 0.0625
    assert not found.alike(0.1)
    assert found.alike(0.25)
    assert [(row["completion"], row["tokens"], row["ended"]) for row in found.rows()[::2]] == [
        (0, 2, True),
        (1, 3, False),
    ]


@pytest.fixture(scope="module")
def small_run(tiny_chat_model, tmp_path_factory):
    """The whole script with a tiny model in the real one's place."""
    folder = tmp_path_factory.mktemp("real_model")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--model_name_or_path", tiny_chat_model, "--runs", folder / "runs"]
        patch.setattr(sys, "argv", ["run.py", *map(str, arguments), "--output_dir", str(folder / "out")])
        assert run.main() == 0
    return folder


def test_ppo_evaluate_and_transformers_read_a_completion_alike(small_run):
    results = json.loads((small_run / "out" / "results.json").read_text())
    assert len(results["completions"]) == 3
    for summary in results["completions"].values():
        # float32 against float64, on scores with a deviation of about 1
        bar = max(1e-5, 4 * summary["float32 and float64"])
        assert summary["ppo and transformers"] <= bar < 1e-3
        assert summary["evaluate and transformers"] <= bar
        assert 0 < summary["ended"] < summary["completions"] == 16
        assert min(summary["spread"]) > 0.1
    with (small_run / "out" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 16 * 2
    assert "the bar is 1e-05" in (small_run / "out" / "results.md").read_text()


def test_another_reading_would_be_seen(small_run):
    """A response that was cut off, with an end after all, scores otherwise by far more than the bar."""
    reward, prompts = small_run / "runs" / "reward", small_run / "runs" / "data" / "prompts.jsonl"
    texts = load_prompts(str(prompts), "train", "ppo")[1]
    cut = {"action": torch.tensor([[10, 11, 12, 2]]), "action_mask": torch.tensor([[True] * 3 + [False]])}
    ended = {**cut, "action_mask": torch.ones(1, 4, dtype=torch.bool)}
    found = [
        scores.classifier_scores(reward, texts, TensorDict({**kind, "prompt_index": torch.tensor([0])}, [1]))
        for kind in (cut, ended)
    ]
    assert (found[0] - found[1]).abs().max() > 100 * run.BAR


def test_a_folder_of_runs_that_is_not_empty_is_one_line(small_run, tiny_chat_model, monkeypatch, capsys):
    arguments = ["--model_name_or_path", str(tiny_chat_model), "--runs", str(small_run / "runs")]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert exit_code("real_model", run.main) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_end_to_end(tmp_path, monkeypatch, capsys):
    """Downloads 93 MB, and takes minutes and 9 GB."""
    pytest.importorskip("gguf")
    arguments = ["--model_name_or_path", tmp_path / "smollm2", "--runs", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments), "--output_dir", str(tmp_path / "out")])
    assert run.main() == 0
    answer = smollm2.greedy_answer(tmp_path / "smollm2", "What is the capital of France?")
    assert "Paris" in answer
    largest = json.loads((tmp_path / "out" / "results.json").read_text())["largest_difference"]
    # 2e-6 was found, and a rounding of 1.5e-5; another reading moves a score by .01 and more
    assert largest["ppo and evaluate"] <= max(run.BAR, 2 * largest["float32 and float64"]) < 1e-4
