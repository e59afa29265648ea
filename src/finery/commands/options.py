"""List every key of a run's file: type, default, range, choices and help; or, with `models`, the models that are known by name."""

import json
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence

from finery.errors import UserError, suggestion
from finery.hub import HUBS, active_hub
from finery.keys import LOOP, Key, Schema, all_keys, default_words, type_words
from finery.models.listed import listed_models
from finery.run import PARTS, SWITCHED, never, not_yet
from finery.training.arguments import RENAMED

GROUPS = {
    "choices": "which parts a run is made of",
    "model": "the base model and its formats",
    "data": "what is learnt",
    "rows": "how samples become rows of tokens",
    "adapters": "what several ways to train share",
    "tokens": "tokens that are added",
    "quantization": "in how many bits frozen weights are held",
    "packing": "whether rows are laid together",
    "template": "how a conversation becomes text",
    "loop": "steps, checkpoints, evaluations",
    "learning": "what is added to the loss, or to the embeddings, whatever the method",
    "fp8": "products in 8-bit floating point",
    "generation": "how answers are drawn",
    "engines": "what several engines share",
    "export": "the merged model",
    LOOP: "handed to the loop of Hugging Face's transformers as they are",
}
"""What each group is about; parts say it themselves."""


def add_arguments(parser: ArgumentParser) -> None:
    """What to show, and in which form."""
    only = "only keys whose name or owner holds this word; `models` lists models, `models qwen3 vl` those whose row holds all these words"
    parser.add_argument("word", nargs="?", default="", help=only)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print docs/keys.md")
    form.add_argument("--json-schema", action="store_true", help="print a JSON schema of a whole run file, for editors")


def run(args: Namespace, words: list[str]) -> int:
    """Print."""
    if args.word == "models":
        print(model_table(words), end="")
        return 0
    if words:
        raise UserError(f"finery options takes one word, found {' '.join(words)!r} as well")
    if args.json_schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    else:
        print(markdown() if args.markdown else listing(args.word, shutil.get_terminal_size((100, 24)).columns), end="")
    return 0


def _title(owner: str) -> str:
    kind, _, name = owner.partition(" ")
    registry = ({kind: registry for kind, (registry, _) in PARTS.items()} | SWITCHED).get(kind)
    return f"{owner}: {registry.says(name) if registry else GROUPS[owner]}"


def _by_owner(keys: Iterable[Key]) -> dict[str, list[Key]]:
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.owner, []).append(key)
    return groups


# ------------------------------------------------------------------ for the terminal


def listing(word: str, width: int) -> str:
    """Plain text, wrapped at `width`; raises `UserError` where nothing holds `word`."""
    word = word.lower().replace("-", "_")
    shown = [key for key in all_keys() if word in key.name or word in key.owner]
    lines: list[str] = []
    for owner, keys in _by_owner(shown).items():
        lines += [*textwrap.wrap(_title(owner), width), *(line for key in keys for line in _entry(key, width)), ""]
    for title, texts in _rest(word):
        lines += [
            title,
            *(line for text in texts for line in textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")),
            "",
        ]
    if not lines:
        known = {key.name for key in all_keys()} | RENAMED.keys() | not_yet()["keys"].keys() | never().keys()
        raise UserError(f"no key holds {word!r}{suggestion(word, known)}")
    return "\n".join(lines[:-1]) + "\n"


def _entry(key: Key, width: int) -> list[str]:
    column = min(34, width // 3)
    told = f"{type_words(key.schema)}; {default_words(key) if key.needed else 'default ' + default_words(key)}"
    texts = [line for text in (told, key.schema["description"]) for line in textwrap.wrap(text, max(width - column, 20))]
    name = f"  {key.name}".ljust(column)
    first = [name + texts.pop(0)] if name[-1] == " " else [name]
    return [*first, *(" " * column + text for text in texts)]


def _rest(word: str) -> Iterator[tuple[str, list[str]]]:
    """Old names and what does not work, each with a title, where anything of it holds `word`."""
    old = [f"{name} = {new}" for name, new in sorted(RENAMED.items()) if word in name or word in new]
    later = sorted(name for name in not_yet()["keys"] if word in name)
    gone = [f"{', '.join(names)}: {instead}" for instead, names in _never_by_sentence(word).items()]
    if old:
        yield "old names that still work", old
    if later:
        yield "not built yet (a value that asks for nothing is accepted)", [", ".join(later)]
    if gone:
        yield "not needed, or never to come", gone


def _never_by_sentence(word: str = "") -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, line in never().items():
        if word in name:
            groups.setdefault(line["instead"], []).append(name)
    return groups


# ------------------------------------------------------------------ models


def model_table(words: Sequence[str]) -> str:
    """The listed models whose row holds every one of `words`, a line each; raises `UserError` where there is none."""
    hub = active_hub()
    shown: list[tuple[str, ...]] = []
    for model in listed_models().values():
        family = f" (or {model.family_template})" if model.family_template else ""
        kind = "multimodal" if model.multimodal else ""
        row = (model.name, model.ids.get(hub, "-"), model.template or f"default{family}", kind)
        known = " ".join((*row, *model.older_names)).lower()
        if all(word.lower() in known for word in words):
            shown.append(row)
    if not shown:
        told = " ".join(words)
        raise UserError(f"no listed model holds {told!r}{suggestion(told, listed_models())}")
    shown.insert(0, ("name", f"id on {HUBS[hub].title}", "template", ""))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in shown)


# ------------------------------------------------------------------ for docs/keys.md

_INTRODUCTION = """# Keys of a run's file

<!-- drawn from the options by `make docs`; do not edit -->

A run is one flat YAML or JSON file; each key below can also be written on the command line, as `key=value` or `--key value`.
`finery options WORD` shows a part of this page in the terminal, `finery options models` the models that are known by name.
`finery options --json-schema > keys.json` is for editors: with `# yaml-language-server: $schema=keys.json` as its first line a file is
completed and checked while it is written.

An empty value means the default; *not set* is a default that is itself empty. `${env:NAME}` and `${other_key}` are filled in.
"""


def markdown() -> str:
    """The text of docs/keys.md."""
    import transformers

    parts = [_INTRODUCTION]
    for owner, keys in _by_owner(all_keys()).items():
        title, _, about = _title(owner).partition(": ")
        if owner == LOOP:
            about += f" (the names and texts of version {transformers.__version__})"
        parts.append(f"## {title}\n\n{about[:1].upper()}{about[1:].rstrip('.')}.\n\n| key | value | default | meaning |\n|---|---|---|---|")
        parts += [_row(key) for key in keys] + [""]
    old = [f"| `{name}` | `{new}` |" for name, new in sorted(RENAMED.items())]
    parts += ["## Old names that still work\n", "| written | means |", "|---|---|", *old, ""]
    later = ", ".join(f"`{name}`" for name in sorted(not_yet()["keys"]))
    parts.append(f"## Not built yet\n\nEach of these is accepted where its value asks for nothing, such as its default.\n\n{later}\n")
    gone = [f"- {', '.join(f'`{name}`' for name in names)}: {instead}." for instead, names in _never_by_sentence().items()]
    return "\n".join([*parts, "## Not needed, or never to come\n", *gone, ""])


def _row(key: Key) -> str:
    meaning = key.schema["description"].replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return f"| `{key.name}` | {type_words(key.schema)} | {default_words(key)} | {meaning} |"


# ------------------------------------------------------------------ for editors


def json_schema() -> Schema:
    """A JSON schema (draft 2020-12) of a whole run file."""
    properties: dict[str, Schema] = {key.name: _property(key) for key in all_keys()}
    properties |= {
        old: {"$ref": f"#/properties/{new}", "deprecated": True, "description": f"Old name of {new}."} for old, new in RENAMED.items()
    }
    for name, default in not_yet()["keys"].items():
        allowed = [default, None] if default is not None else [None, False]
        properties[name] = {"enum": allowed, "default": default, "deprecated": True, "description": "Not built yet."}
    for name, line in never().items():
        allowed = {} if line.get("harmless") else {"enum": [line["default"], None] if line["default"] is not None else [None, False]}
        properties[name] = {**allowed, "default": line["default"], "deprecated": True, "description": f"Not needed: {line['instead']}."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of Finery",
        "type": "object",
        "properties": properties,
        "required": [key.name for key in all_keys() if key.needed],
        "additionalProperties": False,
        "$defs": {
            "filled": {"description": "Filled in from the environment or from another key.", "type": "string", "pattern": r"\$\{.+\}"}
        },
    }


def _property(key: Key) -> Schema:
    """Beside its own values a key may be empty, or be filled in."""
    about = {name: key.schema[name] for name in ("description", "default") if name in key.schema}
    typed = {name: value for name, value in key.schema.items() if name not in about}
    variants = [variant for variant in typed.get("anyOf", [typed]) if variant.get("type") != "null"]
    return {**about, "anyOf": [*variants, {"type": "null"}, {"$ref": "#/$defs/filled"}]}
