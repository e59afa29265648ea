"""The sets and combinations on which Finery's rows are compared with the peer's, and the digest that compares them.

Nothing but the standard library: `peer_rows.py` runs this in the peer's environment, tests/data/test_reference_rule.py in ours.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]
Pair = tuple[list[int], list[int]]
"""Ids and labels of a row."""

TEMPLATES = ("chatml", "default", "qwen", "llama3")
LATE_END = "solar"
"""A template that writes the end token once, after the last answer; the peer refuses `train_on_prompt` with it."""
CUTOFFS = (2048, 64, 24)
OPTIONS: dict[str, dict[str, bool]] = {"neither": {}, "mask_history": {"mask_history": True}, "train_on_prompt": {"train_on_prompt": True}}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
ENTRIES: dict[str, dict[str, Any]] = {
    "identity": {},
    "alpaca_en_demo": {},
    "alpaca_zh_demo": {},
    "history": {"columns": {**ALPACA, "history": "history", "system": "system"}},
    "talk": {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
    "messages": {"formatting": "openai", "columns": {"messages": "messages"}, "tags": TAGS},
}
"""What dataset_info.json says of each set, beside its file."""


def read_sets(data: Path) -> dict[str, Records]:
    """The first 200 records of each set in `ENTRIES`, made of the demo sets in the folder `data`."""
    packaged = Path(__file__).parents[1] / "src" / "finery" / "demo_data" / "sharegpt_demo.json"
    sets = {name: _read(data / f"{name}.json") for name in ("identity", "alpaca_en_demo", "alpaca_zh_demo")}
    sets["history"] = _history(sets["alpaca_en_demo"][200:500], sets["alpaca_zh_demo"][200:500])
    talks = [record["conversations"] for record in _read(data / "glaive_toolcall_en_demo.json")]
    plain = [talk for talk in talks if {message["from"] for message in talk} == {"human", "gpt"}]  # no calls, no tool answers
    sets["talk"] = [*_read(packaged), *({"conversations": talk, "system": ""} for talk in plain)]
    sets["messages"] = [{"messages": _messages(record)} for record in sets["talk"]]
    return {name: records[:200] for name, records in sets.items()}


def digest(rows: Iterable[Pair]) -> list[Any]:
    """How many rows have something to learn, how many have not, and 16 digits of the SHA-256 of the former's ids and labels."""
    learnt = without = 0
    whole = hashlib.sha256()
    for ids, labels in rows:
        if all(label == -100 for label in labels[1:]):  # the first token of a row is never predicted
            without += 1
            continue
        learnt += 1
        whole.update(json.dumps([ids, labels], separators=(",", ":")).encode() + b"\n")
    return [learnt, without, whole.hexdigest()[:16]]


def _read(path: Path) -> Records:
    return json.loads(path.read_text(encoding="utf-8"))


def _history(english: Records, chinese: Records) -> Records:
    """Three records in a row become one, the earlier ones its history; every other one gets a system text."""
    mixed = [record for pair in zip(english, chinese, strict=True) for record in pair]
    found = []
    for place in range(0, len(mixed), 3):
        *earlier, last = mixed[place : place + 3]
        rounds = [["\n".join(filter(None, (record["instruction"], record["input"]))), record["output"]] for record in earlier]
        found.append({**last, "history": rounds, "system": "Answer in one line." if place % 2 else ""})
    return found


def _messages(record: dict[str, Any]) -> Records:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[message["from"]], "content": message["value"]} for message in record["conversations"]]
    if record["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": record["system"]})
    return messages
