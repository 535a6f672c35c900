"""Texts as tokens: the same prompt for training, sampling and scoring, whatever the tokenizer adds."""

from datetime import datetime

import datasets
import pytest
import torch
from chat_tokenizers import (
    CHATML,
    EMPTY_THOUGHT,
    LAST_TURN,
    THOUGHTFUL,
    TRIMMED,
    TWO_ENDS,
    WORDS,
    make_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.sampling import encode_prompts, to_texts
from torchrl_maxmin.preferences import PreferenceDataset, encode
from torchrl_maxmin.preferences.chat import set_chat_template
from torchrl_maxmin.preferences.texts import TextEncoder, cut_start, distinct_texts, plain_text
from torchrl_maxmin.rewards.reader import TextLayout

ASK = [{"role": "user", "content": "a b"}]
ANSWER = [{"role": "assistant", "content": "c"}]


def tokens(tokenizer, row):
    return " ".join(tokenizer.convert_ids_to_tokens(row))


@pytest.mark.parametrize(
    ("form", "prompt", "whole"),
    [
        ("<s> $A", "<s> a b", "<s> a b c </s>"),
        ("$A", "a b", "a b c </s>"),
        ("$A </s>", "a b", "a b c </s>"),
        ("<s> $A </s>", "<s> a b", "<s> a b c </s>"),
    ],
)
def test_what_a_tokenizer_appends_does_not_part_prompt_and_answer(form, prompt, whole):
    tokenizer = make_tokenizer(form)
    encoder = TextEncoder(tokenizer)
    assert tokens(tokenizer, encoder.prompts(["a b"])[0]) == prompt
    assert tokens(tokenizer, encoder(["a b"], ["c"])[0]) == tokens(tokenizer, encode(tokenizer, "a b", "c"))
    assert tokens(tokenizer, encode(tokenizer, "a b", "c")) == whole
    assert tokens(tokenizer, encode_prompts(tokenizer, ["a b"])["prompt_tokens"][0].tolist()) == prompt
    assert tokens(tokenizer, encoder(["a b"], ["c"], ended=[False])[0]) == whole.removesuffix(" </s>")


@pytest.mark.parametrize("form", ["<s> $A", "$A", "$A </s>"])
def test_an_empty_prompt_gets_bos_or_is_refused(form):
    tokenizer = make_tokenizer(form)
    assert TextEncoder(tokenizer).prompts(["", "a"])[0] == [tokenizer.bos_token_id]
    assert tokens(tokenizer, encode(tokenizer, "", "c")) == "<s> c </s>"
    without = make_tokenizer("$A", bos=None)
    with pytest.raises(UserError, match="prompt 1 is empty and the tokenizer has no BOS"):
        encode_prompts(without, ["a", ""])
    assert tokens(without, encode(without, "", "c")) == "c </s>"  # a text to score may have no prompt


TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, st.integers(1, 12), st.sampled_from(["<s> $A", "$A", "<s> $A </s>"]))
def test_a_cut_keeps_the_end_and_bos(prompt, completion, length, form):
    tokenizer = make_tokenizer(form)
    whole, cut = encode(tokenizer, prompt, completion), encode(tokenizer, prompt, completion, length)
    assert len(cut) == min(len(whole), length)
    if len(cut) == len(whole):
        assert cut == whole
    elif length > 1 and whole[0] == tokenizer.bos_token_id:
        assert cut == [tokenizer.bos_token_id, *whole[1 - length :]]
    else:
        assert cut == whole[-length:]
    assert cut[-1] == tokenizer.eos_token_id


def test_cut_start_without_a_limit():
    assert cut_start([1, 2], None, 1) == [1, 2]
    assert cut_start([1, 2, 3], 2) == [2, 3]


# -- conversations ---------------------------------------------------------------------------------


def test_a_conversation_goes_through_the_template():
    tokenizer = make_tokenizer(template=CHATML)
    encoder = TextEncoder(tokenizer)
    start = "<|start|> user a b <|end|> <|start|> assistant"
    assert tokens(tokenizer, encoder.prompts([ASK])[0]).replace("<|start|>user", "<|start|> user") == start
    whole = encoder([ASK], [ANSWER])[0]
    assert whole[: len(encoder.prompts([ASK])[0])] == encoder.prompts([ASK])[0]
    assert tokens(tokenizer, whole) == f"{start} c <|end|>"  # no newline, no EOS behind the end of the turn
    assert tokens(tokenizer, encoder([ASK], [ANSWER], ended=[False])[0]) == f"{start} c"
    assert encoder(["a b"], [ANSWER]) == encoder([ASK], ["c"]) == [whole]  # one side makes it a conversation
    assert encoder.turn_end == tokenizer.convert_tokens_to_ids("<|end|>")
    # strings stay strings, also beside conversations
    mixed = encoder.prompts(["a b", ASK])
    assert tokens(tokenizer, mixed[0]) == "<s> a b"
    assert mixed[1] == encoder.prompts([ASK])[0]


def test_the_words_of_a_template_are_those_of_transformers():
    tokenizer = make_tokenizer(template=CHATML)
    conversation = [{"role": "system", "content": "brief"}, *ASK, *ANSWER, {"role": "user", "content": "d"}]
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    expected = expected if isinstance(expected, list) else expected["input_ids"]
    assert TextEncoder(tokenizer).prompts([conversation]) == [expected]


def test_an_answer_that_was_begun_goes_on():
    tokenizer = make_tokenizer(template=CHATML)
    encoder = TextEncoder(tokenizer)
    begun = [*ASK, {"role": "assistant", "content": "c"}]
    assert tokens(tokenizer, encoder.prompts([begun])[0]).endswith("assistant c")


def test_a_template_that_opens_a_thought_does_not_repeat_it():
    tokenizer = make_tokenizer(template=THOUGHTFUL)
    whole = tokens(tokenizer, TextEncoder(tokenizer)([ASK], [ANSWER])[0])
    assert whole.endswith("assistant <think> c <|end|>")


@pytest.mark.parametrize("template", [CHATML, THOUGHTFUL, LAST_TURN, TWO_ENDS, EMPTY_THOUGHT])
@pytest.mark.parametrize("answer", ["c", "<think> c", "<table> c", "c c", "a b", ""])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "brief"}]])
@pytest.mark.parametrize("before", [[], [*ASK, *ANSWER]])
def test_a_row_is_the_prompt_of_the_policy_and_the_answer_once(template, answer, system, before):
    """Whatever a template writes of the last turn, and whatever it opens before an answer."""
    tokenizer = make_tokenizer(template=template)
    encoder = TextEncoder(tokenizer)
    prompt = [*system, *before, {"role": "user", "content": "hello ?"}]
    start = tokenizer(encoder.prompt_text(prompt), add_special_tokens=False).input_ids
    end = "</s>" if template == LAST_TURN else "<|end|>"
    (whole,) = encoder([prompt], [answer])
    (cut,) = encoder([prompt], [answer], ended=[False])
    assert whole[: len(start)] == start == encoder.prompts([prompt])[0]
    words = tokens(tokenizer, tokenizer(answer, add_special_tokens=False).input_ids)
    if "<think>" in answer and template in (THOUGHTFUL, EMPTY_THOUGHT):
        words = "c"  # the prompt has opened the thought, or the template leaves it out
    if template == EMPTY_THOUGHT:
        words = f"<think> {words}".strip()
    assert tokens(tokenizer, whole[len(start) :]) == f"{words} {end}".strip()
    assert tokens(tokenizer, cut[len(start) :]) == words


@pytest.mark.parametrize(
    ("template", "ending"), [(TWO_ENDS, "<|end|>"), (CHATML, "<|end|>"), (LAST_TURN, None), (None, None)]
)
def test_the_first_of_several_ends_is_that_of_the_turn(template, ending):
    tokenizer = make_tokenizer(template=template)
    turn_end = TextEncoder(tokenizer).turn_end
    assert turn_end == (tokenizer.convert_tokens_to_ids(ending) if ending else None)


@pytest.mark.parametrize("template", [CHATML, TRIMMED, TWO_ENDS])
@pytest.mark.parametrize("answer", ["", "c <s>", "<|end|>", "c <unk>", " c ", "c \n"])
@pytest.mark.parametrize("turns", [1, 3])
def test_the_turn_ends_where_the_template_ends_it(template, answer, turns):
    """Whatever special tokens stand in the answer, and though an earlier turn has such an end too."""
    tokenizer = make_tokenizer(template=template)
    encoder = TextEncoder(tokenizer)
    later = [{"role": "assistant", "content": "d"}, {"role": "user", "content": "b"}][: turns - 1]
    completion = [*later, {"role": "assistant", "content": answer}]
    (whole,) = encoder([ASK], [completion])
    rendered = tokenizer.apply_chat_template([*ASK, *completion], tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert whole == (ids[:-1] if template == TWO_ENDS else ids)
    assert tokens(tokenizer, whole).endswith("<|end|>")


@pytest.mark.parametrize("begun", ["c ", "c\n", " ", "<think> ", "c"])
@pytest.mark.parametrize("template", [CHATML, TRIMMED, TWO_ENDS, EMPTY_THOUGHT, None])
@pytest.mark.parametrize("answer", ["d", " d", "", "a <think> d"])
def test_a_sampled_answer_goes_on_with_a_begun_turn_as_it_is(template, begun, answer):
    """A template that trims, or leaves thoughts out, has no say in what a policy has written."""
    tokenizer = make_tokenizer(template=template)
    encoder = TextEncoder(tokenizer)
    prompt = [*ASK, {"role": "assistant", "content": begun}]
    assert encoder.completion(prompt, answer) == [{"role": "assistant", "content": answer}]
    (row,) = encoder.completions([prompt], [encoder.completion(prompt, answer)], [False])
    assert row == tokenizer(answer, add_special_tokens=False).input_ids
    (ended,) = encoder.completions([prompt], [answer])
    end = tokenizer.convert_tokens_to_ids("<|end|>") if template else tokenizer.eos_token_id
    assert ended == [*row, end]


def test_a_turn_of_the_assistant_behind_another_is_a_turn_of_its_own():
    both = [{"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"}]
    other = [both[0], {"role": "assistant", "content": "a"}]
    table = datasets.Dataset.from_list([{"chosen": [*ASK, *both], "rejected": [*ASK, *other], "user": "u"}])
    data = PreferenceDataset.load(table, conversations="messages")
    assert (data.prompts[0], data.chosen[0], data.rejected[0]) == (ASK, both, other)
    tokenizer = make_tokenizer(template=CHATML)
    (row,) = TextEncoder(tokenizer)(data.prompts[:], data.chosen[:])
    assert tokens(tokenizer, row).count("<|end|>") == 3


@pytest.mark.parametrize(
    ("template", "text", "words"), [(LAST_TURN, " c", "c"), (TRIMMED, " c", " c"), (None, " c", "c")]
)
def test_the_space_behind_the_marker_of_a_turn_is_no_part_of_the_message(template, text, words):
    encoder = TextEncoder(make_tokenizer(template=template))
    assert encoder.completion(ASK, text) == [{"role": "assistant", "content": words}]
    assert encoder.completion("a", text) == text


@pytest.mark.parametrize("template", [CHATML, TWO_ENDS, EMPTY_THOUGHT, None])
def test_an_answer_goes_on_with_the_turn_that_a_prompt_has_begun(template):
    tokenizer = make_tokenizer(template=template)
    encoder = TextEncoder(tokenizer)
    begun = [*ASK, {"role": "assistant", "content": "c "}]
    once = encoder([ASK], [[{"role": "assistant", "content": "c d"}]])
    assert encoder([begun], ["d"]) == encoder([begun], [[{"role": "assistant", "content": "d"}]]) == once
    (start,) = encoder.prompts([begun])
    assert once[0][: len(start)] == start
    assert encoder([begun], ["d"], ended=[False])[0] == once[0][:-1]


def test_a_template_that_hides_or_shifts_an_answer_is_one_line():
    hides = make_tokenizer(template="{% for m in messages %}{{ m['role'] }} {% endfor %}")
    with pytest.raises(UserError, match="leaves out the words of an answer"):
        TextEncoder(hides)([ASK], ["c"], ended=[False])
    shifts = "{{ messages[-1]['content'] | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(UserError, match="cannot be parted"):
        TextEncoder(make_tokenizer(template=shifts))([ASK], ["c c c"])


def test_an_answer_behind_its_prompt_gets_no_space_of_a_text_of_its_own():
    """As Llama 2 puts one before every text, also one without special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "[I]", "▁", "▁a", "a", "▁b", "b", "▁user"]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["[I]"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[I]{{ m['content'] }}[I]"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    encoder = TextEncoder(tokenizer)
    whole = tokenizer("[I]a[I]b</s>", add_special_tokens=False).input_ids
    assert encoder([[{"role": "user", "content": "a"}]], ["b"]) == [whole]


def test_a_sampled_answer_read_as_a_message_is_the_same_transcript():
    """The space behind ``Assistant:`` is of the transcript, not of the message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<s>", pad_token="<s>")
    action = torch.tensor([tokenizer(" yo").input_ids])
    sampled = TensorDict(
        {"action": action, "action_mask": action >= 0, "prompt_index": torch.zeros(1, dtype=torch.int64)}, [1]
    )
    prompts, completions = to_texts(tokenizer, sampled, [ASK])
    assert completions == [[{"role": "assistant", "content": "yo"}]]
    assert TextEncoder(tokenizer).completions(prompts, completions, [False]) == action.tolist()


def test_bos_stands_once_before_a_string_that_begins_with_it():
    tokenizer = make_tokenizer()
    assert tokens(tokenizer, TextEncoder(tokenizer).prompts(["<s> a b"])[0]) == "<s> a b"
    (row,) = TextLayout(tokenizer, "concat", bidirectional=False)(["<s> a b"], [" c"])
    assert tokens(tokenizer, row) == "<s> a b c </s>"


def test_without_a_template_a_conversation_is_a_transcript():
    tokenizer = make_tokenizer()
    encoder = TextEncoder(tokenizer)
    assert encoder([ASK], [ANSWER]) == encoder(["\n\nHuman: a b\n\nAssistant:"], [" c"])
    assert encoder.turn_end is None


def test_a_template_that_refuses_is_one_line():
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"refuses a conversation .roles must alternate.*'user: a b'"):
        TextEncoder(tokenizer).prompts([ASK])


def test_a_system_prompt_opens_conversations_that_have_none(tmp_path):
    tokenizer = set_chat_template(make_tokenizer(template=CHATML), None, "brief")
    encoder, plain = TextEncoder(tokenizer), TextEncoder(make_tokenizer(template=CHATML))
    system = {"role": "system", "content": "brief"}
    assert encoder.prompts([ASK]) == plain.prompts([[system, *ASK]])
    assert encoder([ASK], [ANSWER]) == plain([[system, *ASK]], [ANSWER])
    other = [{"role": "system", "content": "hello"}, *ASK]
    assert encoder.prompts([other]) == plain.prompts([other])
    # saved with the tokenizer, so that later stages and other libraries read the same
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert TextEncoder(AutoTokenizer.from_pretrained(tmp_path)).prompts([ASK]) == encoder.prompts([ASK])


def test_a_system_prompt_opens_every_one_of_several_templates():
    tokenizer = make_tokenizer(template={"default": CHATML, "tool_use": CHATML})
    set_chat_template(tokenizer, None, "brief")
    single = set_chat_template(make_tokenizer(template=CHATML), None, "brief")
    assert tokenizer.chat_template == dict.fromkeys(("default", "tool_use"), single.chat_template)
    assert TextEncoder(tokenizer).prompts([ASK]) == TextEncoder(single).prompts([ASK])


def test_a_chat_template_of_the_users_own(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    from_file = set_chat_template(make_tokenizer(), str(tmp_path / "chat.jinja"))
    assert from_file.chat_template == set_chat_template(make_tokenizer(), CHATML).chat_template == CHATML
    assert set_chat_template(make_tokenizer(template=CHATML), "none").chat_template is None
    for settings_, message in (
        (("nowhere.jinja", None), "'nowhere.jinja' is no file"),
        ((None, "brief"), "--system_prompt needs a chat template"),
        (("{% for %}", None), "chat template refuses"),
    ):
        with pytest.raises(UserError, match=message):
            set_chat_template(make_tokenizer(), *settings_)


# -- preferences -----------------------------------------------------------------------------------


def test_preferences_keep_their_messages_where_a_template_wants_them():
    rows = [
        {"prompt": ASK, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "d"}], "user": "u"}
    ]
    table = datasets.Dataset.from_list(rows)
    data = PreferenceDataset.load(table, conversations="messages")
    assert (data.prompts[0], list(data.chosen), data.rejected[:1]) == (ASK, [ANSWER], [rows[0]["rejected"]])
    (ranking,) = data.rankings()
    assert (ranking.prompt, ranking.responses) == (ASK, [ANSWER, rows[0]["rejected"]])
    plain = PreferenceDataset.load(table)
    assert plain.prompts == ["\n\nHuman: a b\n\nAssistant:"]
    # the transcripts are what the encoder makes of the messages where there is no template
    encoder = TextEncoder(make_tokenizer())
    assert encoder(data.prompts[:], data.chosen[:]) == encoder(plain.prompts[:], plain.chosen[:])
    strings = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "user": "u"}])
    assert PreferenceDataset.load(strings, conversations="messages").prompts == ["a"]


def test_conversations_that_carry_their_prompt():
    both = [[*ASK, *ANSWER], [*ASK, {"role": "assistant", "content": "d"}]]
    table = datasets.Dataset.from_list([{"chosen": both[0], "rejected": both[1], "user": "u"}])
    data = PreferenceDataset.load(table, conversations="messages")
    assert (data.prompts[0], data.chosen[0]) == (ASK, ANSWER)


def test_texts_that_are_equal():
    assert distinct_texts(["a", ASK, "a", [dict(ASK[0])], ANSWER]) == [0, 1, 4]
    assert plain_text("a") == "a"
    assert plain_text(ANSWER) == "c"
    assert plain_text([*ASK, *ANSWER]) == "Human: a b\n\nAssistant: c"


def test_messages_may_carry_what_json_does_not_know():
    """As logs of chats do, with a time beside every message."""
    ask = [{**ASK[0], "timestamp": datetime(2026, 1, 2)}]
    rows = [
        {"prompt": ask, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "d"}], "user": "u"}
    ]
    assert distinct_texts([ask, ask]) == [0]
    data = PreferenceDataset.load(datasets.Dataset.from_list(rows), conversations="messages")
    assert data.prompts[0][0]["content"] == "a b"
