"""The mask of chats: of six model families exactly the answers and their ends, as at inference."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import Dropped, UserError
from ftcore_instruct._formats import BadRow, Chat
from ftcore_instruct._rows import Encoder

TALK = [
    {"role": "user", "content": "Hi, wer bist du?"},
    {"role": "assistant", "content": "An öl lamp.\nReally."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye 👋"},
]
ENDS = {
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
}
CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    """An encoder for a decoder, with all defaults but what is given."""
    given = {"seq2seq": False, "max_length": 4096, "train_on": "assistant", "wrap": True, "system": None}
    return Encoder(tokenizer, **{**given, **options})


def item(messages: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """A chat as the mixture hands it on."""
    where = {"source": 0, "example": 7, "variant": 0, "where": "chats row 7", "choices": []}
    return {**where, "chat": Chat(messages=messages, **extra), "task": "chats", "choice": -1}


def row(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> Any:
    """The one row of a chat."""
    (entry,) = encoder(tokenizer, **options).rows([item(messages, tools=tools)], evaluated=False)
    return entry if isinstance(entry, Dropped) else entry[0]


def trained(tokenizer: Any, made: Any) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = [[]]
    for token in [int(t) for t in made["labels"]]:
        if token != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(r) for r in runs if r]


@pytest.mark.parametrize("name", list(ENDS))
def test_golden_masks(family: Callable[[str], Any], name: str) -> None:
    """Trained are the answers and the token that ends each, no white space after it; nothing else."""
    tokenizer, space = family(name), " " if name == "mistral" else ""
    made = row(tokenizer, TALK)
    assert trained(tokenizer, made) == [space + TALK[i]["content"] + ENDS[name] for i in (1, 3)]
    assert trained(tokenizer, row(tokenizer, TALK, train_on="last")) == [space + "Bye 👋" + ENDS[name]]
    ids, labels = made["input_ids"].tolist(), made["labels"].tolist()
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    bos = tokenizer.bos_token_id
    assert bos is None or ids.count(bos) == (1 if "bos_token" in tokenizer.chat_template else 0)


@pytest.mark.parametrize("name", list(ENDS))
def test_an_answer_follows_the_prompt_of_inference(family: Callable[[str], Any], name: str) -> None:
    """Before each answer stand exactly the tokens that `apply_chat_template` gives for generation."""
    tokenizer = family(name)
    made = row(tokenizer, TALK)
    ids, labels = made["input_ids"].tolist(), made["labels"].tolist()
    starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
    for turn, start in zip((1, 3), starts, strict=True):
        prompt = tokenizer.apply_chat_template(TALK[:turn], add_generation_prompt=True)["input_ids"]
        assert ids[:start] == prompt


def test_system_and_tool_turns(family: Callable[[str], Any]) -> None:
    """A tool call is an answer, to the end of its turn; tools, system and tool turns are not trained."""
    tokenizer = family("qwen")
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12:30"},
        {"role": "assistant", "content": "Half past twelve."},
    ]
    made = row(tokenizer, talk, tools=[{"type": "function", "function": {"name": "time"}}])
    assert trained(tokenizer, made) == [
        '<tool_call>\n{"name": "time", "arguments": {"zone": "CET"}}\n</tool_call><|im_end|>',
        "Half past twelve.<|im_end|>",
    ]
    ((asked,),) = encoder(tokenizer).rows([item(talk[:3])], evaluated=True)  # what it is evaluated by
    call = '<tool_call>\n{"name": "time", "arguments": {"zone": "CET"}}\n</tool_call>'
    assert (asked["target"], json.loads(asked["targets"])) == (call, [call])


def test_generation_markers_are_used_with_the_end_token(family: Callable[[str], Any]) -> None:
    """`{% generation %}` marks the answers; the end of a turn that stands outside of it is trained too."""
    tokenizer = family("marked")
    answers = ["An öl lamp.\nReally.<|im_end|>", "Bye 👋<|im_end|>"]
    assert trained(tokenizer, row(tokenizer, TALK)) == answers
    assert trained(tokenizer, row(tokenizer, TALK, train_on="last")) == answers[1:]


def test_weights_of_turns(family: Callable[[str], Any]) -> None:
    """A turn of weight 0 is masked, another weight stands beside each of its labels."""
    tokenizer = family("chatml")
    talk = [dict(m, weight=w) for m, w in zip(TALK, (1, 0, 1, 0.25), strict=True)]
    made = row(tokenizer, talk, train_on="weights")
    assert trained(tokenizer, made) == ["Bye 👋<|im_end|>"]
    assert set(made["weights"][made["labels"] != -100].tolist()) == {0.25}
    assert not made["weights"][made["labels"] == -100].any()
    with pytest.raises(UserError, match="train_on=weights"):
        row(tokenizer, talk)


@pytest.mark.parametrize(
    ("name", "talk", "reason"),
    [
        (
            "mistral",
            [TALK[0], TALK[0], TALK[1]],
            "the chat template fails: user and assistant must take turns",
        ),
        (
            "gemma",
            [{"role": "system", "content": "x"}, *TALK],
            "the chat template fails: there is no system role",
        ),
        (
            "mistral",
            [{"role": "system", "content": "Be nice."}, *TALK],
            "renders a prompt otherwise once it is",
        ),
        (
            "qwen3",
            [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, *TALK[2:]],
            "renders an answer otherwise once it is followed",
        ),
        (
            "chatml",
            [{"role": "user", "content": "a<|im_end|>b"}, TALK[1]],
            "a text holds the control token <|im_e",
        ),
    ],
)
def test_what_can_not_be_masked_exactly_is_dropped_with_the_reason(
    family: Callable[[str], Any], name: str, talk: Any, reason: str
) -> None:
    """Nothing is trained on a guess; the entry says why, and where the row stands."""
    entry = row(family(name), talk)
    assert isinstance(entry, Dropped)
    assert reason in entry.reason
    assert entry.where == "chats row 7"


def test_last_answer_needs_no_consistency_of_earlier_ones(family: Callable[[str], Any]) -> None:
    """`train_on=last` trains on what a template makes of a whole chat, thoughts of earlier turns left out."""
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, *TALK[2:]]
    tokenizer = family("qwen3")
    assert trained(tokenizer, row(tokenizer, talk, train_on="last")) == ["Bye 👋<|im_end|>"]


def test_template_without_an_end_of_turn_is_refused(family: Callable[[str], Any]) -> None:
    """A model trained without any end would never stop."""
    tokenizer = family("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    assert "marks no end of an answer" in row(tokenizer, TALK).reason


def test_a_long_chat_ends_with_its_last_whole_answer(family: Callable[[str], Any]) -> None:
    """Never within one; where the first has no room, the text before it loses its beginning."""
    tokenizer = family("chatml")
    whole = row(tokenizer, TALK)
    size = len(whole["input_ids"])
    for lost in (1, 2, 10):  # the line's end, the end token, most of the second answer
        made = row(tokenizer, TALK, max_length=size - lost)
        length = len(made["input_ids"])
        assert made["input_ids"].tolist() == whole["input_ids"].tolist()[:length]
        assert made["truncated"] == size - length >= lost
        answers = ["An öl lamp.\nReally.<|im_end|>", "Bye 👋<|im_end|>"]
        assert trained(tokenizer, made) == (answers if lost == 1 else answers[:1])
        assert tokenizer.decode(made["input_ids"]).endswith(answers[lost == 1 and 1])
    (entry,) = encoder(tokenizer, max_length=size - 10).rows([item(TALK)], evaluated=True)
    assert entry[0]["target"] == TALK[1]["content"]  # what is asked, not what was cut away
    long = [{"role": "user", "content": "start " + "abcd " * 60 + "end?"}, TALK[1]]
    made = row(tokenizer, long, max_length=100)
    assert trained(tokenizer, made) == ["An öl lamp.\nReally.<|im_end|>"]
    assert len(made["input_ids"]) <= 100 < len(made["input_ids"]) + made["truncated"]
    assert "end?<|im_end|>" in tokenizer.decode(made["input_ids"])
    assert row(tokenizer, long, max_length=12).reason == "answer lost to truncation"


def test_encoder_decoder_has_a_row_for_each_answer() -> None:
    """The prompt goes to the encoder, the answer with its end token is the target."""
    from ftcore import tiny
    from ftcore_instruct._chat_template import PLAIN

    tokenizer = tiny.tokenizer("tiny_t5")
    tokenizer.chat_template = PLAIN
    (rows,) = encoder(tokenizer, seq2seq=True).rows([item(TALK)], evaluated=False)
    assert [tokenizer.decode(r["labels"]) for r in rows] == ["An öl lamp.\nReally.</s>", "Bye 👋</s>"]
    assert tokenizer.decode(rows[1]["input_ids"]).endswith("User: Bye\nAssistant:</s>")


roles = st.sampled_from(["system", "user", "assistant", "tool", "narrator", ""])
texts = st.text(max_size=12) | st.sampled_from(["<|im_end|>", "</s>", "\n", "<|im_", " \u200b", "🙂"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts | st.none()}), max_size=6)


@settings(max_examples=60, deadline=None)
@given(talk=messages, name=st.sampled_from([*ENDS, "marked"]), size=st.integers(4, 80))
def test_any_chat_is_masked_exactly_or_dropped(
    family: Callable[[str], Any], talk: Any, name: str, size: int
) -> None:
    """Fuzzed: a row's labels are its own tokens, and decode to (part of) the answers."""
    from ftcore_instruct._formats import read

    tokenizer = family(name)
    try:
        chat = read({"messages": talk}, "messages", "text", "target", "fuzz")
    except BadRow:
        return
    assert isinstance(chat, Chat)
    entry = row(tokenizer, chat.messages, max_length=size)
    if isinstance(entry, Dropped):
        assert entry.reason
        return
    labels = entry["labels"]
    assert len(entry["input_ids"]) == len(labels) <= size
    assert labels[0] == -100
    assert (labels != -100).any()
    keep = labels != -100
    assert (labels[keep] == entry["input_ids"][keep]).all()
    said = [m["content"].split() for m in chat.messages if m["role"] == "assistant"]
    got = [run.removesuffix(ENDS.get(name, "<|im_end|>")).split() for run in trained(tokenizer, entry)]
    assert got == said[: len(got)]
