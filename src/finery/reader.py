"""A YAML or JSON file and the words after it become one flat dict of keys, each with the place where it was written."""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from finery.errors import Complaint, UserError, suggestion
from finery.options import Entry, Keys


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as safe_load reads it, with 1e-4 as a number and dates as text."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_keys(written: Iterable[str] | Mapping[str, Any], complaints: list[Complaint]) -> Keys:
    """The keys of a command line or of a dict, as far as they can be read; what is wrong is appended to `complaints`.

    A command line is an optional file, then `key=value`, `--key value` or `--key=value`.
    Raises `UserError` for a file of which nothing can be read.
    """
    if isinstance(written, Mapping):
        keys = {str(name): Entry(value, "Python") for name, value in written.items()}
    else:
        keys = _read_words(list(written), complaints)
    filled = _Filler(keys, complaints)
    return {name: filled.entry(name) for name in keys}


def _read_words(words: list[str], complaints: list[Complaint]) -> Keys:
    keys: Keys = {}
    if words and not words[0].startswith("-") and "=" not in words[0]:
        try:
            keys = _read_file(Path(words.pop(0)), complaints)
        except UserError as error:
            _override({}, words, complaints)
            raise UserError(*error.complaints, *complaints) from None
    _override(keys, words, complaints)
    return keys


def _read_file(path: Path, complaints: list[Complaint]) -> Keys:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(f"{path} is not a .yaml, .yml or .json file; a key is given as key=value or --key value")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.glob("*") if other.suffix == path.suffix] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}{suggestion(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 (found the byte 0x{content[error.start]:02x}); save the file as UTF-8") from None
    read = _read_json if path.suffix.lower() == ".json" else _read_yaml
    try:
        return read(text, path, complaints)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None


def _read_yaml(text: str, path: Path, complaints: list[Complaint]) -> Keys:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path} holds no keys; it should hold `key: value` lines")
        if not isinstance(node, yaml.MappingNode):
            found = "a list" if isinstance(node, yaml.SequenceNode) else "plain text"
            raise UserError(f"{path}:{node.start_mark.line + 1}: should hold `key: value` lines, found {found}")
        own = [key_node.value for key_node, _ in node.value]
        own_nodes = {id(key_node) for key_node, _ in node.value}
        loader.flatten_mapping(node)  # `<<: *other` takes those of another mapping's keys that are not given here
        keys: Keys = {}
        for key_node, value_node in node.value:
            if id(key_node) not in own_nodes and key_node.value in own:
                continue
            source = f"{path}:{key_node.start_mark.line + 1}"
            name = str(loader.construct_object(key_node, deep=True))
            complaints += _twice_within(name, value_node, path, set())
            _put(keys, name, loader.construct_object(value_node, deep=True), source, complaints)
        return keys
    except yaml.YAMLError as error:
        raise UserError(_not_yaml(error, text, path)) from None


def _not_yaml(error: yaml.YAMLError, text: str, path: Path) -> str:
    """Where YAML breaks, and why, in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"{path}:{line}: this is not YAML: there is a control character (0x{int(error.character):02x})"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{path}: this is not YAML: {error}"
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context)
    problem = f"{error.context}, {problem}" if problem.startswith("but ") and error.context else problem
    hints = {
        "\\t": "indent with spaces, not with tabs",
        "mapping values": "a text with a colon in it needs quotes; or is the indentation wrong?",
    }
    hint = next((f"; {hint}" for sign, hint in hints.items() if sign in problem), "")
    if error.context_mark and any(sign in str(error.context) for sign in ("flow", "quoted")):
        hint = f"; is what was opened in line {error.context_mark.line + 1} closed?"
    return f"{path}:{mark.line + 1 if mark else 1}: this is not YAML: {problem}{hint}"


def _twice_within(name: str, node: yaml.Node, path: Path, visited: set[int]) -> Iterator[Complaint]:
    """Complaints about keys that stand twice in a mapping that is a value."""
    children = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) and id(node) not in visited else []
    visited.add(id(node))  # an alias may lead to it again
    seen: dict[str, int] = {}
    for child in children:
        key_node, value_node = child if isinstance(child, tuple) else (None, child)
        inner = f"{name}.{key_node.value}" if isinstance(key_node, yaml.ScalarNode) else name
        if key_node is not None and inner != name:
            line = key_node.start_mark.line + 1
            if inner in seen:
                yield Complaint(
                    f"{inner!r} is already given at {path}:{seen[inner]}; keep one of them", f"{path}:{line}", [inner.partition(".")[0]]
                )
            seen[inner] = line
        yield from _twice_within(inner, value_node, path, visited)


def _read_json(text: str, path: Path, complaints: list[Complaint]) -> Keys:
    if not text.strip():
        raise UserError(f'{path} holds no keys; it should hold an object: {{"key": "value"}}')
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is not JSON: {error.msg}") from None
    if not isinstance(whole, dict):
        raise UserError(f'{path} should hold an object ({{"key": "value"}}), found {_JSON.get(type(whole).__name__, "a number")}')
    keys: Keys = {}
    within: list[str] = []  # names that stand twice in an object inside a value

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        within.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=keep)
    place = _skip(text, text.index("{") + 1)
    while text[place] != "}":
        name, end = decoder.raw_decode(text, place)
        source = f"{path}:{text.count(chr(10), 0, place) + 1}"
        value, end = decoder.raw_decode(text, _skip(text, _skip(text, end) + 1))  # past the colon
        complaints += [Complaint(f"{name!r} holds {twice!r} twice; keep one of them", source, [name]) for twice in within]
        within.clear()
        _put(keys, name, value, source, complaints)
        place = _skip(text, end)
        place = _skip(text, place + 1) if text[place] == "," else place
    return keys


_JSON = {"list": "a list", "str": "plain text", "NoneType": "null", "bool": "true or false"}


def _skip(text: str, place: int) -> int:
    """The next place that is not white space."""
    while text[place] in " \t\r\n":
        place += 1
    return place


def _put(keys: Keys, name: str, value: Any, source: str, complaints: list[Complaint]) -> None:
    if name in keys:
        complaints.append(Complaint(f"{name!r} is already given at {keys[name].source}; keep one of them", source, [name]))
    keys[name] = Entry(value, source)


def _override(keys: Keys, words: list[str], complaints: list[Complaint]) -> None:
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not name or not (equals or word.startswith("--")):
            complaints.append(Complaint(f"{word!r} is neither key=value nor --key value", "command line", [word]))
            continue
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        _assign(keys, name.replace("-", "_") if word.startswith("--") else name, scalar(text), complaints)


def scalar(text: str) -> Any:
    """A value as YAML reads it; a Windows path or a prompt with a colon is text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _assign(keys: Keys, name: str, value: Any, complaints: list[Complaint]) -> None:
    """`a.b=1` sets b inside the mapping a."""
    first, *rest = name.split(".")
    if not rest:
        keys[first] = Entry(value, "command line")
        return
    old = keys[first].value if first in keys and isinstance(keys[first].value, dict) else {}
    root: dict[str, Any] = copy.deepcopy(old)
    inner = root
    for part in rest[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            text = f"{name!r} cannot be set: {part!r} in it is {inner!r} and holds no keys"
            complaints.append(Complaint(text, "command line", [first]))
            return
    inner[rest[-1]] = value
    keys[first] = Entry(root, "command line")


_REFERENCE = re.compile(r"\$\{(env:)?([^${}]+)\}")


class _Unfilled(Exception):
    """A reference that leads nowhere."""

    def __init__(self, complaint: Complaint) -> None:
        super().__init__(complaint)
        self.complaint = complaint


class _Filler:
    """Replaces `${env:NAME}` and `${other_key}`; a value that is nothing else keeps the other's type."""

    def __init__(self, keys: Keys, complaints: list[Complaint]) -> None:
        self.keys = keys
        self.filled: dict[int, Any] = {}  # by identity: an alias that stands in many places is filled in once
        self.complaints = complaints

    def entry(self, name: str) -> Entry:
        """The entry `name` with its references filled in; faulty where that cannot be."""
        source = self.keys[name].source
        try:
            return Entry(self._resolve(name, ()), source)
        except _Unfilled as fault:
            if fault.complaint not in self.complaints:
                self.complaints.append(fault.complaint)
            return Entry(None, source, faulty=True)

    def _resolve(self, name: str, trail: tuple[str, ...]) -> Any:
        if name in trail:
            ring = trail[trail.index(name) :]
            start = ring.index(first := min(ring, key=list(self.keys).index))  # told once, of the key that is written first
            told = " -> ".join((*ring[start:], *ring[:start], first))
            text = f"{first!r} refers to itself: {told}; give {'it' if len(ring) == 1 else 'one of them'} a value"
            raise _Unfilled(Complaint(text, self.keys[first].source, ring))
        return self._expand(self.keys[name].value, name, (*trail, name))

    def _expand(self, value: Any, key: str, trail: tuple[str, ...]) -> Any:
        if isinstance(value, (list, dict)):
            if id(value) not in self.filled:
                inner = value.items() if isinstance(value, dict) else enumerate(value)
                pairs = {name: self._expand(item, key, trail) for name, item in inner}
                self.filled[id(value)] = pairs if isinstance(value, dict) else list(pairs.values())
            return self.filled[id(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return self._look_up(whole, key, trail)
        return _REFERENCE.sub(lambda match: str(self._look_up(match, key, trail)), value)

    def _look_up(self, match: re.Match[str], key: str, trail: tuple[str, ...]) -> Any:
        env, name = match.groups()
        if env and name in os.environ:
            return scalar(os.environ[name])
        if not env and name in self.keys:
            return self._resolve(name, trail)
        what = f"the environment has no {name!r}" if env else f"there is no key {name!r}{suggestion(name, self.keys)}"
        raise _Unfilled(Complaint(f"{key!r} takes {match.group()}, but {what}", self.keys[key].source, [key]))
