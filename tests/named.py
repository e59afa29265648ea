"""The reference's rule for named templates, written straight from its description and its own table of slots."""

import json
from collections.abc import Sequence
from typing import Any

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call
from finery.data.sample import Message, Sample
from finery.data.slots import SlotTemplate
from finery.data.template import Template, TemplateOptions

CONTENT = "{{content}}"
Spec = dict[str, Any]
Pieces = list[tuple[str, list[int]]]


def named(name: str, tokenizer: Any, mask_history: bool = False, **options: Any) -> SlotTemplate:
    """A named template, loaded as a run loads it."""
    return SlotTemplate.load(TemplateOptions.model_validate({"template": name, **options}), name, tokenizer, mask_history)


def text_of(template: Template, sample: Sample) -> str:
    """The pieces of a sample's first conversation, decoded."""
    return str(template.tokenizer.decode([id for turn in template.encode(sample)[0] for id in turn.source + turn.target]))


class Plain:
    """One template; `enable` is the key enable_thinking, `strips` whether thoughts of history are taken out."""

    def __init__(self, spec: Spec, tokenizer: Any, enable: bool | None = True, strips: bool = False) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.enable = enable
        self.strips = strips
        self.opening, self.closing = spec["thought_words"]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def fill(self, pieces: Sequence[Any], content: str = "") -> Pieces:
        found = []
        for piece in pieces:
            if isinstance(piece, str):
                text = piece.replace(CONTENT, content, 1)
                found.append((text, self.ids(text)))
            elif "token" in piece:
                found.append((piece["token"], [self.tokenizer.convert_tokens_to_ids(piece["token"])]))
            elif piece["special"] in ("bos_token", "eos_token"):  # another name is written in one template, and emits nothing
                token = getattr(self.tokenizer, piece["special"])
                if token is not None:
                    found.append((token, [self.tokenizer.convert_tokens_to_ids(token)]))
        return found

    def calls(self, message: Message) -> str:
        found = json.loads(message.content)
        calls = [Call(call["name"], call["arguments"]) for call in (found if isinstance(found, list) else [found])]
        return DIALECTS[self.spec["function_tool_format"]]().write(calls)  # held to the reference by its own tests

    def described(self, tools: str) -> str:
        if self.spec["tools_tool_format"] is None:
            return f"<|tool|>{tools}<|/tool|>"
        return DIALECTS[self.spec["tools_tool_format"]]().describe(json.loads(tools))

    def head(self, sample: Sample) -> tuple[Pieces, str]:
        system, kind = sample.system or self.spec["default_system"], self.spec["class"]
        tools = self.described(sample.tools) if sample.tools else ""
        if kind == "MossVLTemplate" and not system:
            tools = tools.lstrip("\n")
        prefix = self.fill(self.spec["prefix"])
        if not system and not tools:
            return prefix, ""
        if kind == "Llama2Template":
            return prefix, self.spec["system"][0].replace(CONTENT, system + tools, 1)
        return prefix + self.fill(self.spec["system"], system + tools), ""

    def thought(self, text: str, last: bool) -> tuple[str, str, str]:
        """The text, and the empty thought in the source and in the target."""
        if not self.spec["is_reasoning"]:
            return text, "", ""
        if self.enable is False or (self.strips and not last):
            while self.opening in text and self.closing in text.partition(self.opening)[2]:
                before, _, rest = text.partition(self.opening)
                text = before + rest.partition(self.closing)[2]
            text = text.lstrip("\n")
        if (self.strips and not last) or self.opening.strip() in text or self.closing.strip() in text:
            return text, "", ""
        empty = self.closing if self.spec["class"].startswith("Glm47") else self.opening + self.closing
        return (text, "", empty) if self.enable else (text, empty, "")

    def turns(self, sample: Sample) -> list[tuple[Pieces, Pieces]]:
        source, within = self.head(sample)
        found: list[tuple[Pieces, Pieces]] = []
        for place, (question, answer) in enumerate(zip(sample.messages[::2], sample.messages[1::2], strict=True)):
            slot = "observation" if question.role == "observation" else "user"
            source += self.fill(self.spec[slot], within + question.content)
            within = ""
            text = f"{self.opening}{answer.thought}{self.closing}" if answer.thought else ""
            text += self.calls(answer) if answer.role == "function" else answer.content
            text, read, learnt = self.thought(text, 2 * place + 2 == len(sample.messages))
            source += [(read, self.ids(read))] if read else []
            target = [(learnt, self.ids(learnt))] if learnt else []
            found.append((source, target + self.fill(self.spec["function" if answer.role == "function" else "assistant"], text)))
            source = []
        return found

    def text(self, sample: Sample) -> str:
        return "".join(text for source, target in self.turns(sample) for text, _ in source + target)
