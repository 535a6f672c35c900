"""Random settings of a language model: its type, its tokenizer, its files and the flags of four verbs."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from architectures import REFUSED, SERVED, build
from chat_tokenizers import CHATML, THOUGHTFUL, make_tokenizer

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
#: BOS from the template, and turns that must take turns, as Llama 2's and Gemma's
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TEMPLATES = {"none": None, "ChatML": CHATML, "thought": THOUGHTFUL, "no system": NO_SYSTEM, "strict": STRICT}
AROUND = {"BOS": "<s> $A", "nothing": "$A", "BOS, EOS": "<s> $A </s>", "EOS": "$A </s>"}
TEXTS = ["a b", "hello c", "d", "c a a"]
LONG = " ".join(["a b c d"] * 25)  # more tokens than any position table of the tiny models

PROMPTS = {
    "strings": TEXTS,
    "lists of one string": [[text] for text in TEXTS],
    "an empty string": ["", *TEXTS[1:]],
    "blanks": ["a b", "  ", "\n"],
    "unknown words": ["zebra", "a zebra ?"],
    "a long string": [*TEXTS, LONG],
    "messages": [[("user", text)] for text in TEXTS],
    "an empty message": [[("user", "")], [("user", "a")]],
    "a long message": [[("user", text)] for text in [*TEXTS, LONG]],
    "a system message": [[("system", "brief"), ("user", text)] for text in TEXTS],
    "turns": [[("user", "a"), ("assistant", "b"), ("user", text)] for text in TEXTS],
    "an opened answer": [[("user", text), ("assistant", "hello")] for text in TEXTS],
    "the assistant first": [[("assistant", "hello"), ("user", text)] for text in TEXTS],
    "another role": [[("tool", text)] for text in TEXTS],
    "null": ["a b", None, "d"],
    "numbers": [1, 2, 3],
    "strings and messages": ["a b", [("user", "hello c")]],
    "an empty conversation": [[("user", "a")], []],
}
COMMON = ("strings", "messages", "a system message", "turns")  # drawn as often as all others together
SFT_COLUMNS = ("prompt, completion", "text", "messages", "prompt, chosen")


@dataclass(frozen=True)
class Case:
    """One setting; the fields say what is unlike a plain model and a plain file."""

    number: int
    model: str
    around: str
    bos: bool
    eos: bool
    pad: str
    template: str
    ends: str
    padding_side: str
    spare_rows: int
    prompts: str
    columns: str
    answers: str
    flags: dict[str, dict[str, Any]]
    evaluation: str

    def __str__(self) -> str:
        missing = [f"no {name}" for name in ("bos", "eos") if not getattr(self, name)]
        tokenizer = [f"adds {self.around}", *missing, f"pad {self.pad}", f"template {self.template}"]
        return f"{self.number}: {self.model} | {', '.join(tokenizer)} | {self.prompts} | {self.columns}"


def draw_cases(count: int, seed: int = 0) -> list[Case]:
    """The same cases for the same seed; every model comes up as often as any other."""
    rng = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        names += rng.sample([*SERVED, *REFUSED], len(SERVED) + len(REFUSED))
    return [_draw(rng, number, name) for number, name in enumerate(names[:count])]


def _draw(rng: random.Random, number: int, model: str) -> Case:
    def rarely(value: Any, otherwise: Any, chance: float = 0.15) -> Any:
        return value if rng.random() < chance else otherwise

    template = rng.choice(list(TEMPLATES))
    prompts = rng.choice(COMMON) if rng.random() < 0.5 else rng.choice(list(PROMPTS))
    chats = isinstance(PROMPTS[prompts][0], list) and isinstance(PROMPTS[prompts][0][0], tuple)
    cut = {"max_prompt_length": 12} if rng.random() < 0.5 else {}
    generations = rng.choice([1, 2])
    objectives = ["min_of_means", "mean_of_mins"] + ["mean_of_prompt_mins"] * (generations == 2)
    calibrations = ["sft_std", "sft_std", "sft_mean", "win_rate", "none"]
    layouts = [None, None, None, "chat" if TEMPLATES[template] else "concat", "response", "auto"]
    peft = {"use_peft": True, "lora_r": 2, "adapters": rng.choice(["per_group", "shared"])}
    flags = {
        "sft": {"completion_only_loss": rng.choice([True, False]), **rarely({"max_length": 16}, {}, 0.4)},
        "reward": {
            "num_groups": rng.choice([1, 2]),
            "head": rng.choice(["linear", "mlp"]),
            "calibration": rng.choice(calibrations),
            "text_layout": rng.choice(layouts),
            **rarely({"max_length": 16}, {}, 0.3),
            **rarely(peft, {}, 0.3),
        },
        "ppo": {
            "reward": rng.choice(["model", "model", "function"]),
            "num_generations": generations,
            "objective": rng.choice(objectives),
            "calibration": rng.choice(calibrations),
            "temperature": rng.choice([1.0, 0.7]),
            **cut,
        },
        "evaluate": {
            "judge": rng.choice(["model", "model", "function", "pairs"]),
            "temperature": rng.choice([1.0, 0.7]),
            **cut,
        },
    }
    return Case(
        number=number,
        model=model,
        around=rng.choice(list(AROUND)),
        bos=rarely(False, True, 0.3),
        eos=rarely(False, True, 0.08),
        pad=rng.choice(["own", "EOS", "missing"]),
        template=template,
        ends=rng.choice(["one", "two", "one out of the vocabulary", "none"]),
        padding_side=rng.choice(["left", "right"]),
        spare_rows=rng.choice([0, 0, 8]),
        prompts=prompts,
        columns=rng.choice(SFT_COLUMNS),
        answers=rng.choice(["strings", "messages"]) if chats else rarely("messages", "strings"),
        flags=flags,
        evaluation=rng.choice(["alone", "with the reward model"]),
    )


def write_case(case: Case, folder: Path) -> None:
    """The base model, and the files of the four verbs."""
    tokenizer = make_tokenizer(
        AROUND[case.around],
        bos="<s>" if case.bos else None,
        eos="</s>" if case.eos else None,
        template=TEMPLATES[case.template],
    )
    tokenizer.add_tokens([f"spare{i}" for i in range(4)])  # images' tokens, where a model has some
    tokenizer.pad_token = {"own": "<pad>", "EOS": tokenizer.eos_token, "missing": None}[case.pad]
    tokenizer.padding_side = case.padding_side
    model = build(case.model, tokenizer)
    if case.spare_rows and not model.config.is_encoder_decoder:
        model.resize_token_embeddings(len(tokenizer) + case.spare_rows)
    if getattr(model, "generation_config", None) is not None:
        last = {"two": tokenizer.convert_tokens_to_ids("<|end|>"), "one out of the vocabulary": 9999}
        own = [tokenizer.eos_token_id, last.get(case.ends)]
        ends = [token for token in own if token is not None]
        model.generation_config.eos_token_id = ends if ends and case.ends != "none" else None
    transformers.utils.logging.set_verbosity_error()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rows in _tables(case).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tables(case: Case) -> dict[str, list[dict[str, Any]]]:
    prompts = [_messages(cell) for cell in PROMPTS[case.prompts]]

    def answer(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if case.answers == "messages" else text

    def row(prompt: Any) -> dict[str, Any]:
        chat = isinstance(prompt, list) and all(isinstance(part, dict) for part in prompt)
        if case.columns == "messages" or (case.columns == "text" and chat):
            asked = prompt if chat else [{"role": "user", "content": prompt}]
            return {case.columns: [*asked, {"role": "assistant", "content": "b c"}]}
        if case.columns == "text":
            return {"text": prompt}
        return {"prompt": prompt, case.columns.split(", ")[1]: answer("b c")}

    pairs = []
    for user in range(4):
        chosen, rejected = ("b", "c d a") if user % 2 else ("c d a", "b")
        for prompt in prompts:
            texts = {"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected)}
            pairs.append({**texts, "user_id": f"u{user}"})
    asked = [{"prompt": prompt, "topic": i} for i, prompt in enumerate(prompts)]
    return {"sft": [row(prompt) for prompt in prompts], "pairs": pairs, "prompts": asked}


def _messages(cell: Any) -> Any:
    if not isinstance(cell, list) or (cell and isinstance(cell[0], str)):
        return cell
    return [{"role": role, "content": content} for role, content in cell]
