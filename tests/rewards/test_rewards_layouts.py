"""Which tokens a prompt and its completion become, in every layout."""

import pytest
from rewards_models import COMPLETIONS, PROMPTS, bert_tokenizer, chat_tokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import encode
from torchrl_maxmin.preferences.chat import set_chat_template
from torchrl_maxmin.rewards.reader import TextLayout, takes_pairs

BERT, CHAT = bert_tokenizer(), chat_tokenizer()
MESSAGES = [
    [{"role": "user", "content": "the film"}],
    [{"role": "system", "content": "we"}, {"role": "user", "content": "a"}],
]
ANSWERS = [[{"role": "assistant", "content": "was great"}], [{"role": "assistant", "content": "it"}]]


def words(tokenizer, rows):
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in rows]


def decoder(kind, **options):
    return TextLayout(CHAT, kind, bidirectional=False, **options)


def encoder(kind="auto", tokenizer=BERT, **options):
    return TextLayout(tokenizer, kind, bidirectional=True, **options)


@pytest.mark.parametrize("max_length", [None, 3, 9])
def test_continuation_is_the_encoding_of_preference_pairs(tokenizer, max_length):
    for one in (tokenizer, CHAT):
        layout = TextLayout(one, "continuation", bidirectional=False)
        expected = [encode(one, p, c, max_length) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert layout(PROMPTS, COMPLETIONS, max_length) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("continuation", "<s> the film was great </s>"),
        ("concat", "<s> the film was great </s>"),
        ("auto", "<s> the film was great </s>"),
        ("response", "<s> was great </s>"),
        ("{completion} b {prompt}", "<s> was great b the film </s>"),
        ("text_pair", "<s> the film was great"),
        ("chat", "<s> <user> the film </s> <assistant> was great </s>"),
    ],
)
def test_a_decoders_layouts(kind, expected):
    # a tokenizer of words joins no text: "concat" needs the space
    prompt = "the film " if kind in ("concat", "auto") else "the film"
    layout = decoder(kind) if kind != "text_pair" else TextLayout(CHAT_PAIRS, kind, bidirectional=False)
    assert words(CHAT, layout([prompt], ["was great"])) == [expected]


def _with_pairs():
    from tokenizers import processors

    made = chat_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return made


CHAT_PAIRS = _with_pairs()


def test_eos_is_not_doubled():
    assert words(CHAT, decoder("concat")(["the "], ["film </s>"])) == ["<s> the film </s>"]


@pytest.mark.parametrize("kind", ["auto", "chat", "continuation"])
def test_conversations_go_through_the_chat_template(kind):
    assert words(CHAT, decoder(kind)(MESSAGES, ANSWERS)) == [
        "<s> <user> the film </s> <assistant> was great </s>",
        "<s> <system> we </s> <user> a </s> <assistant> it </s>",
    ]
    # one side as text is one message
    mixed = decoder(kind)(["the film", MESSAGES[1]], [ANSWERS[0], "it"])
    assert mixed == decoder(kind)(MESSAGES, ANSWERS)


def test_conversations_without_a_template_are_the_transcripts_of_preference_data():
    transcript = ["\n\nHuman: the film\n\nAssistant:", "\n\nSystem: we\n\nHuman: a\n\nAssistant:"]
    plain = TextLayout(set_chat_template(chat_tokenizer(), "none"), "continuation", bidirectional=False)
    for layout in (plain, encoder("text_pair"), encoder()):
        assert layout(MESSAGES, ANSWERS) == layout(transcript, [" was great", " it"])


@pytest.mark.parametrize("kind", ["continuation", "concat", "chat", "response", "{completion}"])
def test_a_completion_that_was_cut_off_has_no_end(kind):
    layout = decoder(kind)
    whole, cut = layout(["the film"] * 2, ["was great"] * 2, None, [True, False])
    assert whole[-1] == CHAT.eos_token_id
    assert cut == whole[:-1]
    if kind in ("continuation", "chat"):
        assert layout(MESSAGES, ANSWERS, None, [False, False]) == [r[:-1] for r in layout(MESSAGES, ANSWERS)]


def test_an_encoders_layouts():
    assert words(BERT, encoder()(["the film", ""], ["was great", "it"])) == [
        "[CLS] the film [SEP] was great [SEP]",
        "[CLS] it [SEP]",
    ]
    assert words(BERT, encoder("response")(["the film"], ["was great"])) == ["[CLS] was great [SEP]"]
    assert words(BERT, encoder("{prompt} a {completion}")(["the"], ["film"])) == ["[CLS] the a film [SEP]"]
    roberta = bert_tokenizer("roberta")
    assert words(roberta, encoder(tokenizer=roberta)(["the"], ["film"])) == [
        "[CLS] the [SEP] [SEP] film [SEP]"
    ]


def test_a_tokenizer_without_pairs_joins_the_texts():
    from tokenizers import processors

    single = bert_tokenizer("roberta")
    single.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    assert not takes_pairs(single)
    assert words(single, encoder(tokenizer=single)(["the"], ["film"])) == ["[CLS] the film [SEP]"]
    with pytest.raises(UserError, match="separates two texts"):
        encoder("text_pair", single)


def test_takes_pairs_only_with_segments_that_the_separator_tells():
    from tokenizers import processors

    assert takes_pairs(BERT)
    assert takes_pairs(bert_tokenizer("roberta"))
    odd = bert_tokenizer()  # as XLNet: the separator belongs to the second text
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]",
        pair="$A [SEP]:1 $B:1 [SEP]:1 [CLS]:2",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    assert not takes_pairs(odd)


def test_long_texts_lose_their_start_under_a_decoder():
    prompt, completion = "the film was awful", "it was great"
    for kind in ("continuation", "{prompt} {completion}", "chat"):
        (row,) = decoder(kind)([prompt], [completion])
        (cut,) = decoder(kind, max_length=5)([prompt], [completion])
        assert cut == [CHAT.bos_token_id, *row[-4:]]
        assert len(row) > 5
    (both,) = decoder("continuation", max_length=5)([prompt], [completion], 3)
    assert len(both) == 3  # the smaller limit holds


def test_long_texts_are_cut_by_an_encoders_tokenizer():
    (row,) = encoder(max_length=8)(["the film was awful"], ["it was great we loved it"])
    expected = BERT("the film was awful", "it was great we loved it", truncation=True, max_length=8).input_ids
    assert row == expected
    assert row[0] == BERT.cls_token_id
    assert row[-1] == BERT.sep_token_id
    assert row.count(BERT.sep_token_id) == 2


def test_no_texts_are_no_rows():
    for layout in (decoder("auto"), encoder()):
        assert layout([], []) == []


def test_mistakes():
    with pytest.raises(UserError, match="none of auto, continuation"):
        decoder("sideways")
    with pytest.raises(UserError, match="chat template"):
        encoder("chat")
    with pytest.raises(UserError, match="a decoder's"):
        encoder("continuation")
    with pytest.raises(ValueError, match="1 prompts, but 2 completions"):
        decoder("auto")(["a"], ["a", "b"])
