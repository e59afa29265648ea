"""An Ollama Modelfile, with the template told in Ollama's language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SIGNATURE = "# Written by Finery"
"""The first line of our Modelfile; a folder that has it may be replaced by another export."""


def ollama_file(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], num_ctx: int, weights: str = ".") -> str:
    """An Ollama Modelfile for `weights`, a path beside it; the template is derived from the tokenizer's own by rendering marked messages.

    Where the derived template does not give the same text for a longer conversation, none is written and a
    comment says so.
    """
    pieces = _pieces(tokenizer)
    lines = [SIGNATURE, f"FROM {weights}", ""]
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
