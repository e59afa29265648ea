"""Models as the page names them: the list's names, the one that needs no hub, and whatever has a path of its own."""

from __future__ import annotations

from finery.hub import Hub
from finery.models.demo_model import demo_folder
from finery.models.listed import hub_id, listed_models

DEMO = "SmolLM2-135M-Instruct (demo)"
"""The model that needs no hub."""
CUSTOM = "Custom"
HUBS: dict[str, Hub] = {"huggingface": "hf", "modelscope": "ms", "openmind": "om"}


def path_of(name: str, hub: str) -> str:
    """Where a named model is; raises `UserError` where the hub does not have it."""
    return str(demo_folder()) if name == DEMO else hub_id(name, HUBS[hub])


def name_of(path: str | None, present: str | None = None) -> str:
    """What a path is called: as at `present` where that is meant, or by the first of the list that has it on some hub."""
    if path == str(demo_folder()):
        return DEMO
    named = [name for name, model in listed_models().items() if path in model.ids.values()]
    return present if present in named else next(iter(named), CUSTOM)
