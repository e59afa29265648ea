"""Models known by name: what each hub calls them, and the template of their conversations.

The list is listed.json: groups of models that share a template. Of a model it gives one id where Hugging Face and ModelScope have the
same, else the ids of all hubs. `older_names` are names that earlier lists gave to models of this one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from finery.errors import UserError
from finery.hub import HUBS, Hub

TUNED = ("-chat", "-distill", "-instruct", "-thinking")
"""What stands in the name of a model that has learnt to converse."""


@dataclass(frozen=True)
class ListedModel:
    """A model, its ids on the hubs, and the template of its family."""

    name: str
    ids: Mapping[Hub, str]
    family_template: str | None
    multimodal: bool
    older_names: tuple[str, ...] = ()

    @property
    def template(self) -> str | None:
        """The template of its family; none for a base model, which has learnt no template."""
        tuned = self.multimodal or any(word in self.name.lower() for word in TUNED)
        return self.family_template if tuned else None


@cache
def listed_models() -> Mapping[str, ListedModel]:
    """Every listed model by its name; read at the first call."""
    facts = json.loads(Path(__file__).with_name("listed.json").read_text(encoding="utf-8"))
    older: dict[str, tuple[str, ...]] = {}
    for old, name in facts["older_names"].items():
        older[name] = (*older.get(name, ()), old)
    return MappingProxyType({name: _model(name, ids, group, older) for group in facts["groups"] for name, ids in group["models"].items()})


def _model(name: str, ids: str | dict[Hub, str], group: dict[str, Any], older: dict[str, tuple[str, ...]]) -> ListedModel:
    every: dict[Hub, str] = {"hf": ids, "ms": ids} if isinstance(ids, str) else ids
    return ListedModel(name, every, group.get("template"), group.get("multimodal", False), older.get(name, ()))


@cache
def _by_name() -> Mapping[str, ListedModel]:
    """By names in small letters, older names among them."""
    return {name.lower(): model for model in listed_models().values() for name in (model.name, *model.older_names)}


@cache
def _by_id() -> Mapping[str, list[ListedModel]]:
    """By hub ids in small letters, and by their last parts, which several models may share."""
    found: dict[str, list[ListedModel]] = {}
    for model in listed_models().values():
        ids = {hub_id.lower() for hub_id in model.ids.values()}
        for word in ids | {hub_id.rpartition("/")[2] for hub_id in ids}:
            found.setdefault(word, []).append(model)
    return found


def find_model(name: str) -> ListedModel | None:
    """The model that the list gives this name, in capitals or not."""
    return _by_name().get(name.lower())


def hub_id(name: str, hub: Hub) -> str:
    """What `hub` calls a listed model, and any other name as it is; raises `UserError` where only other hubs have the model."""
    model = find_model(name)
    if model is None:
        return name
    if hub in model.ids:
        return model.ids[hub]
    there = f"which is {model.ids['hf']!r} on {HUBS['hf'].title}"
    raise UserError(f"{HUBS[hub].title} is not known to have {model.name!r}, {there}; {HUBS[hub].elsewhere}, or give a folder or an id")


def template_of(name_or_path: str) -> str | None:
    """The template of a listed model, told by a name of it, a hub id, or a folder that is called so or lies in a hub's cache."""
    for word in _words(name_or_path):
        model = find_model(word)
        if meant := [model] if model else _by_id().get(word.lower(), []):
            templates = {model.template for model in meant}
            return templates.pop() if len(templates) == 1 else None
    return None


def _words(name_or_path: str) -> Iterator[str]:
    """What may be a name or an id in a path, from the surest to the least sure."""
    yield name_or_path
    parts = PurePath(name_or_path).parts
    if "snapshots" in parts[1:]:  # the caches of all hubs: models--org--name/snapshots/revision, or org--name/…
        yield parts[parts.index("snapshots", 1) - 1].removeprefix("models--").replace("--", "/", 1)
    for word in ("/".join(parts[-2:]), *parts[-1:]):
        yield word.replace("___", ".")  # as ModelScope writes a dot in a folder's name


def did_you_mean(name: str, hub: Hub) -> str:
    """What to say after a name that `hub` does not have: what it calls that model, or the most alike of all names; else nothing."""
    from difflib import get_close_matches

    if meant := _by_id().get(name.lower(), []):
        there = dict.fromkeys(model.ids[hub] for model in meant if hub in model.ids)
        return "" if name.lower() in map(str.lower, there) or not there else f"; did you mean {next(iter(there))!r}?"
    words = ((model.name, *model.older_names, model.ids.get(hub, model.name)) for model in listed_models().values())
    known = {word.lower(): word for of_one in words for word in of_one}
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.85)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
