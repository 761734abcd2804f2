"""Formats: told by their columns, read to one shape, bad rows by their reason; any row fuzzed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import Dropped, UserError
from ftcore_instruct._formats import FORMATS, BadRow, Chat, Task, asked, detect, read
from ftcore_instruct._rows import Encoder
from ftcore_instruct._templates import Choice, Templates

ASK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def both(row: dict[str, Any]) -> Any:
    """A row, read in the format it is detected as."""
    return read(row, detect(row, "text", "target", "f"), "text", "target", "f")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASK},
        {"text": ASK},
        {"prompt": ASK[:1], "completion": ASK[1:]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {**ASK[1], "tool_calls": None},
            ]
        },
    ],
)
def test_chats_of_every_kind_are_one_chat(row: dict[str, Any]) -> None:
    """Messages, ShareGPT, prompt and completion as messages, contents in parts, keys that Arrow adds."""
    assert both(row).messages == ASK


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 1", "target": "2", "task": "sum"}, ("sum", "Add.", "1 1", "2")),
        ({"instruction": "Add.", "input": "", "output": "2"}, ("f", "Add.", "", "2")),
        ({"prompt": "1+1=", "completion": "2"}, ("f", "", "1+1=", "2")),
        ({"question": "1+1?", "answer": 2}, ("f", "", "1+1?", "2")),
        ({"text": "1+1", "target": "2"}, ("f", "", "1+1", "2")),
    ],
)
def test_tasks_of_every_kind_are_one_task(row: dict[str, Any], expected: tuple[str, ...]) -> None:
    """Task files, Alpaca's columns, prompts with completions, and the config's own column names."""
    found = both(row)
    assert (found.task, found.instruction, found.input, found.target) == expected


def test_tool_calls_have_no_arguments_of_others() -> None:
    """As Arrow gives a row beside others: each key of any is there, and null."""
    call = {"function": {"name": "time", "arguments": {"zone": "CET", "city": None, "days": [1, None]}}}
    schema = {"function": {"name": "time", "parameters": {"zone": {"type": "string"}, "city": None}}}
    found = both({"messages": [ASK[0], {**ASK[1], "tool_calls": [call]}], "tools": [schema]})
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zone": "CET", "days": [1, None]}
    assert found.tools[0]["function"]["parameters"] == {"zone": {"type": "string"}}


def test_right_answers_choices_and_rationale() -> None:
    """The target comes first of the right answers, and is not doubled."""
    found = both(
        {"input": "q", "target": "b", "targets": ["a", "b"], "choices": ["b", "c"], "rationale": "so"}
    )
    assert (found.targets, found.choices, found.rationale) == (["b", "a"], ["b", "c"], "so")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ASK[:1]}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}, *ASK]}, "unknown role 'bot'"),
        ({"messages": [ASK[0], {"role": "assistant", "content": " \n"}]}, "empty answer"),
        ({"messages": ASK[1:]}, "an assistant turn that nothing precedes"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASK[1]]},
            "a content that is no text",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
        ({"input": "q", "target": "  "}, "empty answer"),
        ({"input": "", "target": "a"}, "empty prompt"),
        ({"prompt": None, "completion": "x"}, "empty prompt"),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], reason: str) -> None:
    """Each fault has one wording, so that equal faults are counted together."""
    with pytest.raises(BadRow, match=f"^{reason}$"):
        both(row)


def test_unknown_columns_and_missing_ones_are_the_users_to_mend() -> None:
    """No format fits, or the chosen one lacks a column: one line, with what there is."""
    with pytest.raises(UserError, match="no known format has the columns text, label; known: messages"):
        detect({"text": "a", "label": "b"}, "text", "target", "f")
    with pytest.raises(UserError, match="no column 'output', which the format alpaca needs"):
        read({"instruction": "x"}, "alpaca", "text", "target", "f")


values = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=3)
keys = st.sampled_from(["messages", "conversations", "instruction", "input", "output", "target", "prompt",
                        "completion", "task", "choices", "targets", "rationale", "text"])  # fmt: skip
turns = st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), values), max_size=3)


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(keys, values | turns, min_size=1), form=st.sampled_from(FORMATS))
def test_any_row_is_read_or_refused_with_a_reason(row: dict[str, Any], form: str) -> None:
    """Whatever the columns hold, a row ends as a chat, a task, or an error of ours."""
    try:
        found = read(row, form, "text", "target", "f")
    except (BadRow, UserError):
        return
    assert isinstance(found, Chat | Task)


# Task templates.

TASK = Task(
    task="sum", input="1 1", target="2", instruction="Add.", choices=["1", "2"], rationale="One more."
)


def test_template_file_by_task_and_its_errors(tmp_path: Any) -> None:
    """The first pattern that fits gives the templates; a fault names file and template, a bad row its own."""
    path = tmp_path / "t.yaml"
    path.write_text(
        "sum:\n- prompt: 'Q {{ input }} {{ options }}\n\n'\n  answer: '= {{ target }}'\n"
        "'*':\n- '{{ input }} {{ nothing }}'\n"
    )
    templates = Templates(str(path))
    assert templates.render(TASK, Choice()) == ("Q 1 1 Options:\n- 1\n- 2\n", "= 2")
    other = Task(task="other", input="x", target="y")
    with pytest.raises(BadRow, match=r"template 0 of .*t.yaml fails: 'nothing' is undefined"):
        templates.render(other, Choice())
    path.write_text("a:\n- '{{ input '\n")
    with pytest.raises(UserError, match="a template of 'a' is wrong"):
        Templates(str(path))
    path.write_text("a:\n- '{{ input }}'\n")
    with pytest.raises(UserError, match="no pattern fits the task 'sum'"):
        Templates(str(path)).render(TASK, Choice())


def test_templates_can_not_reach_python(tmp_path: Any) -> None:
    """The environment is sandboxed: an attribute that leads to code is refused."""
    path = tmp_path / "t.yaml"
    path.write_text("'*':\n- '{{ input.__class__.__mro__ }}'\n")
    with pytest.raises(BadRow, match="unsafe"):
        Templates(str(path)).render(TASK, Choice())


def test_reasoning_and_turned_around_forms() -> None:
    """With `cot` the answer is the rationale, then the target; inversion asks for the input."""
    templates = Templates()
    assert templates.render(TASK, Choice(cot=True))[1] == "One more.\nSo the answer is 2."
    assert all(templates.render(TASK, Choice(template=i))[0].endswith("\n") for i in range(4))
    prompt, answer = templates.render(TASK, Choice(inverted="question"))
    assert (answer, "2" in prompt, "1 1" in prompt) == ("1 1", True, False)
    assert templates.render(TASK, Choice(inverted="rationale"))[1] == "One more."


# Rows of tasks.


def task_item(prompt: str, answer: str, shots: list[str]) -> dict[str, Any]:
    where = {
        "source": 0,
        "example": 3,
        "variant": 0,
        "where": "f row 3",
        "choices": ["yes", "no"],
        "choice": ["yes", "no"].index(answer) if answer in ("yes", "no") else -1,
    }
    return {
        **where,
        "prompt": prompt,
        "answer": answer,
        "shots": shots,
        "separator": "\n\n",
        "task": "f",
        "targets": [answer],
    }


def encode(tokenizer: Any, item: dict[str, Any], evaluated: bool = False, **options: Any) -> Any:
    given = {"seq2seq": False, "max_length": 256, "train_on": "assistant", "wrap": False, "system": None}
    (entry,) = Encoder(tokenizer, **{**given, **options}).rows([item], evaluated=evaluated)
    return entry if isinstance(entry, Dropped) else entry[0]


def test_a_task_is_its_prompt_answer_and_end_token(family: Callable[[str], Any]) -> None:
    """One start token; a text that spells a control token stays text; the end token is trained."""
    tokenizer = family("mistral")
    made = encode(tokenizer, task_item("Is </s> an end?\n", "yes", []))
    assert made["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    assert made["input_ids"].tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(made["labels"][made["labels"] != -100]) == "yes</s>"


def test_a_long_task_loses_exemplars_then_its_start_never_its_answer(family: Callable[[str], Any]) -> None:
    """Fewer exemplars are no cut; a cut is counted; an answer that does not fit drops the row."""
    tokenizer = family("mistral")
    shots = ["a" * 60, "b" * 60, "c" * 60]
    made = encode(tokenizer, task_item("Q\n", "yes", shots), max_length=140)
    text = tokenizer.decode(made["input_ids"])
    assert (text, made["cut"]) == (f"<s>{'b' * 60}\n\n{'c' * 60}\n\nQ\nyes</s>", 0)
    made = encode(tokenizer, task_item("Q" * 90 + "?\n", "yes", shots), max_length=50)
    assert tokenizer.decode(made["input_ids"]) == f"<s>{'Q' * 43}?\nyes</s>"
    assert made["cut"] == made["truncated"] == 92 + 1 + 4 - 50
    entry = encode(tokenizer, task_item("Q\n", "y" * 50, []), max_length=50)
    assert (entry.reason, entry.where) == ("answer lost to truncation", "f row 3")


def test_tasks_as_chats_lose_the_same(family: Callable[[str], Any]) -> None:
    """In a chat template the header stays, and the prompt loses exemplars, then its beginning."""
    tokenizer = family("chatml")
    made = encode(tokenizer, task_item("Q\n", "yes", ["a" * 60, "b" * 60]), wrap=True, max_length=100)
    assert tokenizer.decode(made["input_ids"]).startswith("<|im_start|>user\n" + "b" * 60 + "\n\nQ<|im_end|>")
    made = encode(tokenizer, task_item("Q" * 90 + "?", "yes", []), wrap=True, max_length=60)
    assert tokenizer.decode(made["input_ids"]).startswith("<|im_start|>user\nQ")
    assert tokenizer.decode(made["labels"][made["labels"] != -100]) == "yes<|im_end|>"
    assert made["cut"] > 0


def test_choices_are_tokens_as_they_would_be_trained(family: Callable[[str], Any]) -> None:
    """Each choice of an evaluated row has the end token; the right one is that of the row's own labels."""
    for wrap, name in ((False, "mistral"), (True, "chatml")):
        tokenizer = family(name)
        made = encode(tokenizer, task_item("Q\n", "no", []), evaluated=True, wrap=wrap)
        ends = made["choice_lengths"].cumsum()
        parts = [
            made["choice_ids"][e - n : e].tolist() for e, n in zip(ends, made["choice_lengths"], strict=True)
        ]
        assert made["choice"] == 1
        assert parts[1] == made["labels"][made["labels"] != -100].tolist()
        assert len(parts[0]) == len(parts[1]) + 1


def test_a_completion_is_trained_whatever_the_prompt_is() -> None:
    """Turns and a text make one chat; a list where a text belongs is no text."""
    assert both({"prompt": ASK[:1], "completion": "ho"}).messages == ASK
    with pytest.raises(BadRow, match="a list where a text belongs"):
        both({"prompt": "hi", "completion": ASK[1:]})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "high"])
def test_weights_are_numbers_from_zero_on(weight: Any) -> None:
    """A negative one would turn the gradient of the whole step around."""
    with pytest.raises(BadRow, match="a weight that is no number from 0 on"):
        both({"messages": [ASK[0], {**ASK[1], "weight": weight}]})


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (("q", "a"), {"input": "i", "target": "t", "q": "x", "a": "y"}, ("x", "y")),
        (("instruction", "best"), {"instruction": "i", "output": "t", "best": "y"}, ("i", "y")),
        (("q", "target"), {"input": "i", "target": "t", "q": "x"}, ("x", "t")),
        (("q", "a"), {"messages": ASK, "q": "x", "a": "y"}, ("x", "y")),
        (("question", "target"), {"input": "i", "target": "t", "question": "x"}, ("i", "t")),  # a guess
        (("input", "output"), {"instruction": "d", "input": "i", "output": "o"}, ("i", "o")),  # one too
    ],
)
def test_columns_that_are_named_win(columns: Any, row: dict[str, Any], expected: tuple[str, str]) -> None:
    """Over columns that happen to be called as a format's; what core guessed does not."""
    found = read(row, detect(row, *columns, "f"), *columns, "f")
    assert (found.input, found.target) == expected
    assert found.verbatim is (columns not in (("question", "target"), ("input", "output")))


def test_a_named_chat_and_a_system_column() -> None:
    """The named column of messages is read; a row's `system` goes before a chat that has none."""
    row = {"messages": ASK, "talk": [*ASK, *ASK]}
    assert read(row, detect(row, "talk", "target", "f"), "talk", "target", "f").messages == row["talk"]
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    system = {"role": "system", "content": "Be short."}
    assert both({"conversations": turns, "system": "Be short."}).messages == [system, *ASK]
    assert (
        both({"messages": [{**system, "content": "Own."}, *ASK], "system": "x"}).messages[0]["content"]
        == "Own."
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**ASK[0], "weight": 0}], "completion": "no"},
        {"messages": ASK},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]},
        {"input": "hi"},
        {"instruction": "hi", "output": None},
        {"question": "hi"},
        {"prompt": "hi", "completion": "no"},
    ],
)
def test_rows_without_answers_are_asked(row: dict[str, Any]) -> None:
    """Whatever answer they have is not read: something stands in for it."""
    form = detect(row, "text", "target", "f", answered=False)
    found = read(asked(row, form, "text", "target"), form, "text", "target", "f")
    if isinstance(found, Chat):
        assert [m["content"] for m in found.messages] == ["hi", "?"]
        assert "weight" not in found.messages[0]
    else:
        assert (found.input or found.instruction, found.target, found.targets) == ("hi", "?", ["?"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'*': [[1]]", "a template of '*' is wrong: it must be a text, or {prompt: ..., answer: ...}"),
        ("'*': [{answer: x}]", "a template of '*' has no prompt"),
        ("'*': [{prompt: 1}]", "a template of '*' is wrong: 1 is no text"),
        ("'*': ['x']\nsum: ['y']", "'sum' stands after '*'"),
    ],
)
def test_wrong_template_files(tmp_path: Any, text: str, message: str) -> None:
    """One line with the file and the pattern."""
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        Templates(str(tmp_path / "t.yaml"))


def test_template_without_an_answer_trains_nothing(tmp_path: Any) -> None:
    """An empty answer would train the end token alone; a pattern that is a number names a task."""
    (tmp_path / "t.yaml").write_text(
        "7: [{prompt: '{{ input }}', answer: '{{ rationale }}'}]\n'*': ['{{ input }}']"
    )
    templates = Templates(str(tmp_path / "t.yaml"))
    one = Task(task="7", input="x", target="y")
    with pytest.raises(BadRow, match=r"template 0 of .*t.yaml gives an empty answer"):
        templates.render(one, Choice())
    assert templates.render(Task(task="8", input="x", target="y"), Choice()) == ("x", "y")


def test_tasks_beside_weighted_chats_have_weight_one(family: Callable[[str], Any]) -> None:
    """All rows of a split have the same columns."""
    for wrap in (True, False):
        made = encode(family("chatml"), task_item("Q\n", "yes", []), train_on="weights", wrap=wrap)
        assert set(made["weights"][made["labels"] != -100].tolist()) == {1.0}


def test_a_choice_that_spells_a_control_token_names_its_row(family: Callable[[str], Any]) -> None:
    """It can't be scored as it would be trained."""
    item = {**task_item("Q\n", "no", []), "choices": ["no", "<|im_end|>"]}
    entry = encode(family("chatml"), item, evaluated=True, wrap=True)
    assert entry.reason == "a choice can't be scored: a text holds the control token <|im_end|>"
    assert entry.where == "f row 3"
