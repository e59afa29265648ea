"""From what the controls hold to the keys of a run, and back; and the command that a shell takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from finery.errors import UserError
from finery.web.form import Control, controls

Keys = dict[str, Any]


def to_keys(values: Mapping[str, Any], tab: str) -> Keys:
    """The keys that the controls of the top and of a tab come to; a key's own default is left out, but for what readers look for."""
    keys: Keys = {}
    for control in controls().values():
        if control.tab not in ("top", tab) or not control.counts(values) or control.id not in values:
            continue
        keys |= _keys_of(control, values[control.id])
    return keys


def _keys_of(control: Control, value: Any) -> Keys:
    if control.values is not None:
        return dict(control.values.get(str(value).lower() if isinstance(value, bool) else str(value), {}))
    if None in (set_ := control.keys).values() or not set_:
        return {}
    if any(meant is not ... for meant in set_.values()):
        return dict(set_) if value else {}
    (key,) = set_
    default = control.schema.get("default")
    plain = typed(value, default)
    if not control.always and ((not control.asks(value) and not _is_off(value, default)) or plain == default):
        return {}
    return {key: plain} if plain not in (None, "", []) else {}


def _is_off(value: Any, default: Any) -> bool:
    return value is False and default is True


def typed(value: Any, default: Any = None) -> Any:
    """What a control holds, as a file would: numbers are numbers, lists are lists, empty texts nothing."""
    if isinstance(value, list):
        return [str(one) for one in value]
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return ([part.strip() for part in text.split(",") if part.strip()] if isinstance(default, list) else text) or None


def to_values(keys: Mapping[str, Any], tab: str) -> tuple[dict[str, Any], Keys]:
    """What the controls of the top and of a tab hold for these keys, and the keys that none of them stands for."""
    rest = dict(keys)
    values: dict[str, Any] = {}
    for control in controls().values():
        if control.tab not in ("top", tab):
            continue
        values[control.id] = _value_of(control, rest, keys)
    for control in controls().values():
        if control.id in values and values[control.id] is not None:
            for key in control.keys if control.values is None else control.values.get(str(values[control.id]), {}):
                rest.pop(key, None)
    return {id: controls()[id].begins if value is None else value for id, value in values.items()}, rest


def _value_of(control: Control, rest: Mapping[str, Any], keys: Mapping[str, Any]) -> Any:
    if control.values is not None:
        fitting = [name for name, meant in control.values.items() if meant and all(keys.get(key) == want for key, want in meant.items())]
        return max(fitting, key=lambda name: len(control.values[name]), default=None)  # type: ignore[index]
    if not control.keys:
        return None
    if any(meant is not ... for meant in control.keys.values()):
        return True if all(keys.get(key) == want for key, want in control.keys.items()) else None
    (key,) = control.keys
    if key not in rest or rest[key] is None:
        return None
    value = rest[key]
    if control.many:
        return [str(one) for one in value] if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    if control.kind == "choice":
        return str(value).lower() if isinstance(value, bool) else str(value)
    if control.kind == "text":
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return value


def more_keys(text: str) -> Keys:
    """Keys that are typed as YAML beside the controls; raises `UserError` for what is no mapping."""
    try:
        told = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        raise UserError(f"the further keys are no YAML: {' '.join(str(error).split())}") from None
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise UserError(f"the further keys should be lines of 'key: value', found {text.strip()[:60]!r}")
    return {str(key): value for key, value in told.items()}


def as_yaml(keys: Mapping[str, Any]) -> str:
    """The file that the command line takes."""
    return yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True, width=1000)


def as_command(keys: Mapping[str, Any], verb: str = "train") -> str:
    """The command, a line for each key."""
    words = [f"    --{key} {_word(value)}" for key, value in keys.items()]
    return " \\\n".join([f"llamafactory-cli {verb}", *words])


def _word(value: Any) -> str:
    if isinstance(value, list):
        return shlex.quote(",".join(map(str, value)))
    if isinstance(value, (dict, bool)) or value is None:
        return shlex.quote(json.dumps(value, ensure_ascii=False))
    return shlex.quote(str(value))
