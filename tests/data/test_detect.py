"""The format of records is told by their columns, or it is said what was found."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finery.data.detect import detect
from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Tags
from finery.data.sample import Sample
from finery.errors import UserError


def talk(*turns: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


SHARE = ("from", "value")
Q, GOOD, BAD = ("user", "a"), ("assistant", "b"), ("assistant", "c")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def samples(records: list[dict[str, Any]]) -> list[Sample]:
    """What records become in the format that was told."""
    entry, said = detect(records)
    assert said.startswith(f"read as {entry['formatting']}: ")
    form = FORMATS[entry["formatting"]](Columns(**entry["columns"]), Tags(**entry["tags"]), entry["ranking"])
    assert not form.unread
    return [form.read(record) for record in records]


def told(record: dict[str, Any]) -> tuple[str, str]:
    """The format, and what becomes of a record in it, in short: `user assistant | better worse`."""
    entry, _ = detect([record])
    (sample,) = samples([record])
    answers = [answer.content for answer in (sample.chosen, sample.rejected) if answer]
    parts = [" ".join(message.content for message in sample.messages), *([" ".join(answers)] if answers else [])]
    assert entry["ranking"] == bool(answers)
    return entry["formatting"], " | ".join(parts).replace("\n", "+")


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"instruction": "a", "input": "i", "output": "b", "text": "all"}, ("alpaca", "a+i b")),
        ({"instruction": "a", "context": "i", "response": "b", "category": "x"}, ("alpaca", "a+i b")),
        ({"instruction": "a", "input": None, "output": "b"}, ("alpaca", "a b")),
        ({"prompt": "a", "response": "b"}, ("alpaca", "a b")),
        ({"prompt": "a", "completion": "b"}, ("alpaca", "a b")),
        ({"prompt": "a", "answer": "b", "input": "no"}, ("alpaca", "a b")),
        ({"Question": "a", "Complex_CoT": "t", "Response": "b"}, ("alpaca", "a b")),
        ({"question": "a", "answer": '{"x": 1}'}, ("alpaca", 'a {"x": 1}')),
        ({"input": "a", "output": "b"}, ("alpaca", "a b")),
        ({"query": "a", "response": "b"}, ("alpaca", "a b")),
        ({"prompt": "a", "source": "x"}, ("alpaca", "a")),
        ({"question": "a", "id": 5}, ("alpaca", "a")),
        ({"text": "a"}, ("alpaca", "a")),
        ({"title": "t", "content": "a", "input": "no", "output": 5}, ("alpaca", "a")),
        ({"messages": talk(Q, GOOD), "prompt": "a", "prompt_id": "x"}, ("openai", "a b")),
        ({"messages": talk(("human", "a"), ("model", "b"))}, ("openai", "a b")),
        ({"conversations": talk(Q, GOOD)}, ("openai", "a b")),
        ({"id": 1, "trace": talk(Q, GOOD)}, ("openai", "a b")),
        ({"messages": json.dumps(talk(Q, GOOD))}, ("openai", "a b")),
        ({"conversations": talk(("human", "a"), ("gpt", "b"), keys=SHARE)}, ("sharegpt", "a b")),
        ({"conversations": talk(("system", "s"), Q, GOOD, keys=SHARE)}, ("sharegpt", "a b")),
        ({"prompt": talk(Q), "completion": talk(GOOD)}, ("openai", "a b")),
        ({"prompt": talk(("human", "a"), keys=SHARE), "completion": "b"}, ("openai", "a b")),
        ({"prompt": talk(Q)}, ("openai", "a")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("alpaca", "a | b c")),
        ({"question": "a", "system": "s", "chosen": "b", "rejected": "c"}, ("alpaca", "a | b c")),
        ({"instruction": "a", "input": "i", "chosen": "b", "rejected": "c", "output": "x"}, ("alpaca", "a+i | b c")),
        ({"prompt": talk(Q), "chosen": talk(GOOD), "rejected": talk(BAD)}, ("openai", "a | b c")),
        ({"messages": talk(Q), "chosen": talk(GOOD)[0], "rejected": talk(BAD)[0]}, ("openai", "a | b c")),
        ({"messages": talk(Q), "chosen": "b", "rejected": "c"}, ("openai", "a | b c")),
        ({"prompt": "a", "chosen": talk(Q, GOOD), "rejected": talk(Q, BAD), "messages": talk(Q, GOOD)}, ("openai", "a | b c")),
        (
            {
                "conversations": talk(("human", "a"), keys=SHARE),
                "chosen": talk(("gpt", "b"), keys=SHARE)[0],
                "rejected": talk(("gpt", "c"), keys=SHARE)[0],
            },
            ("sharegpt", "a | b c"),
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_each_shape_is_told(record: dict[str, Any], wanted: tuple[str, str]) -> None:
    assert told(record) == wanted


@pytest.mark.parametrize(
    ("record", "role", "value"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "desirable", True),
        ({"prompt": talk(Q), "completion": talk(GOOD), "label": False}, "desirable", False),
        ({"messages": talk(Q, GOOD), "kto_tag": True}, "desirable", True),
        ({"text": "a", "label": True}, "desirable", None),
        ({"messages": talk(Q), "chosen": "b", "rejected": "c", "label": True}, "desirable", None),
        ({"question": "a", "answer": "b", "label": 3}, "desirable", None),
        ({"question": "a", "answer": "b", "system_prompt": "s"}, "system", "s"),
        ({"messages": talk(Q, GOOD), "system": "s"}, "system", "s"),
        ({"messages": talk(Q, GOOD), "tools": [{"name": "f"}]}, "tools", '[{"name": "f"}]'),
        ({"messages": talk(Q, GOOD), "functions": '[{"name": "f"}]'}, "tools", '[{"name": "f"}]'),
        ({"messages": talk(Q, GOOD), "tools": "hammer, saw"}, "tools", ""),
        ({"messages": talk(Q, GOOD), "images": ["1.png"]}, "images", ("1.png",)),
        ({"question": "a", "answer": "b", "image": {"bytes": b"x", "path": None}}, "images", ({"bytes": b"x", "path": None},)),
        ({"messages": talk(Q, GOOD), "videos": [["1.png", "2.png"]], "audios": "a.wav"}, "videos", (["1.png", "2.png"],)),
    ],
)
def test_columns_beside_the_conversation(record: dict[str, Any], role: str, value: Any) -> None:
    assert getattr(samples([record])[0], role) == value


def test_history_is_read() -> None:
    records = [{"instruction": "c", "output": "d", "history": past} for past in ([["a", "b"]], [], None)]
    assert [len(sample.messages) for sample in samples(records)] == [4, 2, 2]


def test_role_words_of_the_data_become_tags() -> None:
    turns = talk(("human", "a"), ("tool_call", '{"name": "f", "arguments": {}}'), ("tool", "r"), ("bot", "b"), keys=SHARE)
    (sample,) = samples([{"conversations": turns}])
    assert [message.role for message in sample.messages] == ["user", "function", "observation", "assistant"]
    assert detect([{"conversations": turns}])[0]["tags"] == {"assistant_tag": "bot", "observation_tag": "tool", "function_tag": "tool_call"}


def test_tool_calls_are_read_whatever_the_keys_are_called() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": None, "tool_calls": CALL["tool_calls"]}]
    (sample,) = samples([{"conversations": turns}])
    assert sample.messages[1].role == "function"


def test_what_most_records_say_counts() -> None:
    odd = [{"output": 5}, {"messages": None, "instruction": "a"}, {}]
    entry, _ = detect([*odd, *[{"instruction": "a", "output": "b", "messages": None}] * 5])
    assert entry["columns"] == {"prompt": "instruction", "query": None, "response": "output"}


def test_the_user_is_told() -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "score": 5}
    assert detect([pair])[1] == (
        "read as alpaca: questions in column 'prompt', better answers in column 'chosen', worse answers in column 'rejected'; "
        "nothing reads 'score'"
    )
    assert detect([{"messages": talk(Q, GOOD), "tools": []}])[1] == "read as openai: messages in column 'messages', tools in column 'tools'"
    assert detect([{"text": "a"}])[1] == "read as alpaca: plain text in column 'text'"
    assert detect([{"prompt": "a"}])[1] == "read as alpaca: questions without answers in column 'prompt'"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "there is no record"),
        (["a", {"text": "a"}], "records should be objects with named columns, found str"),
        ([None], "records should be objects with named columns, found nothing"),
        ([{}], "cannot be told from the columns none; rename them to 'instruction' and 'output', 'messages'"),
        ([{"q": "a", "n": 1, "x": None}], "from the columns 'q' (text), 'n' (int), 'x' (nothing); rename them"),
        ([{"question": "a", "reply": "b"}], "'question' (text), 'reply' (text)"),
        ([{"chosen": "a", "rejected": "b"}], "a question with 'chosen' and 'rejected'"),
        ([{"messages": []}], "'messages' (list)"),
        ([{"messages": [{"foo": 1}]}], "'messages' (list)"),
        ([{"one": talk(Q, GOOD), "two": talk(Q, BAD)}], "'one' (messages), 'two' (messages)"),
        ([{str(place): place for place in range(20)}], "'11' (int), …; rename"),
    ],
)
def test_what_no_format_fits_is_told(records: list[Any], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        detect(records)


def as_lines(text: str) -> list[Any]:
    return [json.loads(line) if line.startswith("{") else {"text": line} for line in text.split("\n") if line]


@pytest.mark.parametrize(
    ("file", "read", "formatting", "ranking"),
    [
        ("identity.json", json.loads, "alpaca", False),
        ("alpaca_en_demo.json", json.loads, "alpaca", False),
        ("alpaca_zh_demo.json", json.loads, "alpaca", False),
        ("glaive_toolcall_en_demo.json", json.loads, "sharegpt", False),
        ("dpo_en_demo.json", json.loads, "sharegpt", True),
        ("kto_en_demo.json", json.loads, "openai", False),
        ("mllm_demo.json", json.loads, "openai", False),
        ("mllm_video_audio_demo.json", json.loads, "openai", False),
        ("c4_demo.jsonl", as_lines, "alpaca", False),
        ("wiki_demo.txt", as_lines, "alpaca", False),
    ],
)
def test_real_records_become_what_the_registry_makes_of_them(
    shared: Path, file: str, read: Callable[[str], Any], formatting: str, ranking: bool
) -> None:
    folder = shared / "data"
    records = read((folder / file).read_text(encoding="utf-8"))
    raw = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[Path(file).stem]
    named = FORMATS[raw.get("formatting", "alpaca")](
        Columns(**raw.get("columns", {})), Tags(**raw.get("tags", {})), raw.get("ranking", False)
    )
    entry, _ = detect(records)
    assert (entry["formatting"], entry["ranking"]) == (formatting, ranking)
    for ours, record in zip(samples(records), records, strict=True):
        theirs = named.read(record)
        assert (ours.messages, ours.system, ours.tools, ours.chosen) == (theirs.messages, theirs.system, theirs.tools, theirs.chosen)
        assert (ours.rejected, ours.desirable, ours.images, ours.audios) == (
            theirs.rejected,
            theirs.desirable,
            theirs.images,
            theirs.audios,
        )
