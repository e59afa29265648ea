"""Saving a whole model: weights, tokenizer, template, stop tokens and an Ollama Modelfile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.options import Finding, OptionGroup, PathText

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ExportOptions(OptionGroup):
    export_dir: PathText | None = None
    """Where the merged model goes; <output_dir>-merged where it is not given."""
    export_size: int = Field(5, gt=0)
    """The largest file of weights, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where the merge is computed: on the CPU, or on a GPU where there is one."""
    export_legacy_format: bool = False
    """Ask for pickled .bin files. Refused: safetensors is what every tool reads today."""

    def check(self, run: Any) -> Iterator[Finding]:
        """Nothing pickled is written."""
        if self.export_legacy_format:
            yield Finding("export_legacy_format", "asks for pickled .bin files, which are never written; safetensors will be", fatal=False)


SIGNATURE = "# Written by Finery"
"""The first line of our Modelfile; a folder that has it may be replaced by another export."""


EXPORTED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py", "")
"""Endings of what an export writes; a folder that holds anything else is not replaced."""


def is_export(folder: Path) -> bool:
    """Whether an export of ours has filled this folder, and nobody has put anything else into it."""
    path = folder / "Modelfile"
    signed = path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE)
    return signed and all(entry.is_file() and entry.suffix in EXPORTED for entry in folder.iterdir())


def merge_device(options: ExportOptions) -> torch.device:
    """Where `export_device` puts the merge."""
    import torch

    return torch.device("cuda" if options.export_device == "auto" and torch.cuda.is_available() else "cpu")


def save_model(model: PreTrainedModel, folder: Path, shard_gb: float, stop_ids: frozenset[int]) -> None:
    """Weights as safetensors of at most `shard_gb` GB a file, config, and the stop tokens in the generation config."""
    model.config.use_cache = True  # training switches it off
    model.save_pretrained(str(folder), max_shard_size=int(shard_gb * 1e9))
    save_stop_tokens(model, folder, stop_ids)


def save_stop_tokens(model: Any, folder: Path, stop_ids: frozenset[int]) -> None:
    """The model's generation config with every token at which an answer ends, so that other servers stop there, too."""
    import copy

    from transformers import GenerationConfig

    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = sorted(stop_ids)
    if not config.do_sample:  # settings of a sampling that is off would be refused
        config.temperature = config.top_p = config.top_k = None
    config.save_pretrained(str(folder))


def ollama_file(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], num_ctx: int) -> str:
    """An Ollama Modelfile; the template is derived from the tokenizer's own by rendering marked messages.

    Where the derived template does not give the same text for a longer conversation, none is written and a
    comment says so.
    """
    pieces = _pieces(tokenizer)
    lines = [SIGNATURE, "FROM .", ""]
    if pieces is None:
        lines.append("# the chat template of this model cannot be told in Ollama's language; Ollama will use its own guess")
    else:
        template = (
            f"{pieces.head}{{{{ if .System }}}}{pieces.system[0]}{{{{ .System }}}}{pieces.system[1]}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{pieces.user[0]}{{{{ .Content }}}}{pieces.user[1]}'
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{pieces.closing}{{{{ end }}}}{{{{ end }}}}'
        )
        lines.append(f'TEMPLATE """{template}"""')
        if pieces.default_system:
            lines.append(f'SYSTEM """{pieces.default_system}"""')
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([id]), ensure_ascii=False)}" for id in sorted(stop_ids)]
    return "\n".join([*lines, f"PARAMETER num_ctx {num_ctx}", ""])


_SYSTEM, _USER, _ANSWER = "@the-system@", "@the-question@", "@the-answer@"


@dataclass(frozen=True)
class _Pieces:
    """A template in pieces: the text around a system message and around a question up to the answer, and the rest."""

    head: str
    system: tuple[str, str]
    user: tuple[str, str]
    closing: str  # of an answer
    default_system: str

    def render(self, system: str, rounds: int) -> str:
        """A conversation of so many answered questions and one more question."""
        question = f"{self.user[0]}{_USER}{self.user[1]}"
        opening = f"{self.system[0]}{system}{self.system[1]}" if system else ""
        return self.head + opening + f"{question}{_ANSWER}{self.closing}" * rounds + question


def _pieces(tokenizer: PreTrainedTokenizerBase) -> _Pieces | None:
    """Derived by rendering marked messages, and proved by rendering others; nothing where the proof fails."""
    from jinja2 import TemplateError

    def render(*messages: tuple[str, str], prompt: bool = True) -> str:
        dicts = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=prompt))

    system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
    try:
        closing = render(user, answer, prompt=False).rpartition(_ANSWER)[2]
        long = render(system, user, answer, user, answer, user)
        alone = render(user)
        without = render(user, answer, user)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):  # a template's own code
        return None
    opening = without.partition(_ANSWER)[2].partition(_USER)[0].removeprefix(closing)
    before, _, rest = long.partition(_SYSTEM)
    middle = rest.partition(_USER)[0].removesuffix(opening)
    head = alone.partition(_USER)[0].removesuffix(opening)
    default_system = ""
    if head.startswith(before) and head.endswith(middle) and len(head) > len(before) + len(middle):
        default_system, head = head[len(before) : len(head) - len(middle)], ""
    pieces = _Pieces(head, (before.removeprefix(head), middle), (opening, alone.rpartition(_USER)[2]), closing, default_system)
    proved = pieces.render(_SYSTEM, 2) == long and pieces.render(default_system, 1) == without
    return pieces if proved else None
