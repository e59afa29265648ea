"""What a run settles about the model's own Jinja template, written at its head: whoever reads the saved one sees the same."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finery.data.dialects.base import jinja_string
from finery.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finery.data.template import TemplateOptions

DATE = {
    "%Y-%m-%d": "2024-07-26", "%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri",
    "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
"""The day that Llama 3's own template names where it is not told one."""
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f".replace('{directive}', '{said}')" for directive, said in DATE.items())
    + " -}}{%- endmacro %}\n"  # the newline is trimmed with the block, and the template goes on at the beginning of a line, as it did
)
_SET = "{%- if NAME is not defined -%}{%- set NAME = VALUE -%}{%- endif %}\n"
_SYSTEM = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': TEXT}] + messages -%}{%- endif %}\n"
)
_SETTLED = {"enable_thinking": False, "preserve_thinking": True}
_FORMS = [_FIXED_DATE, *(_SET.replace("NAME", name) for name in _SETTLED), _SYSTEM]
_PATTERNS = [re.escape(form).replace("VALUE", "(?:true|false)").replace("TEXT", r"'(?:[^'\\]|\\.)*'") for form in _FORMS]
_HEAD = re.compile(f"(?:{'|'.join(_PATTERNS)})*")
"""What an earlier run settled."""

log = get_logger(__name__)


def settle(tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> None:
    """Write the fixed day, the default system text and what is settled of thoughts into the tokenizer's template."""
    sources = tokenizer.chat_template
    if isinstance(sources, dict):
        tokenizer.chat_template = {name: _settled(source, options) for name, source in sources.items()}  # type: ignore[assignment]
    elif sources:
        tokenizer.chat_template = _settled(sources, options)


def _settled(source: str, options: TemplateOptions) -> str:
    """A template with its head; what an earlier run settled stands, unless a key says otherwise."""
    found = _HEAD.match(source)
    old = found[0] if found else ""
    body = source[len(old) :]
    lines = [_FIXED_DATE] if "strftime_now" in body else []
    if lines and not old:
        log.info("the chat template writes the date of the day: here, and in what is saved, it is always %s", DATE["%Y-%m-%d"])
    for name, value in _SETTLED.items():
        line = _SET.replace("NAME", name).replace("VALUE", str(value).lower())
        if getattr(options, name) is value or (line in old and name not in options.model_fields_set):
            lines.append(line)
    if options.default_system:
        lines.append(_SYSTEM.replace("TEXT", jinja_string(options.default_system)))
    elif options.default_system is None:
        lines += [kept[0] for kept in re.finditer(_PATTERNS[-1], old)]
    return "".join(lines) + body
