"""The texts that a trained model and its export are both asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.data.sample import BadRecord, Message, Role, Sample
from finery.data.template import Template
from finery.errors import UserError
from finery.files import read_yaml

ROLES: Mapping[str, Role] = {"u": "user", "a": "assistant"}


@dataclass(frozen=True)
class Probe:
    """A prompt in tokens, as training made them, and what other programs are told to get the same."""

    ids: list[int]
    shown: str
    answered: bool = False
    called: Mapping[str, Any] | None = None  # arguments of `apply_chat_template`; nothing for a plain text

    def again(self, tokenizer: Any) -> list[int]:
        """The tokens that another tokenizer makes of it."""
        if self.called is None:
            return tokenizer(self.shown)["input_ids"]
        return list(tokenizer.apply_chat_template(**self.called, tokenize=True, return_dict=False, add_generation_prompt=True))


def probes(template: Template, num_known: int) -> list[Probe]:
    """Conversations and plain texts, and one of the tokens from `num_known` on, which the base did not know.

    Conversations that the template refuses are left out.
    """
    found = list(_written(template))
    added = [str(template.tokenizer.convert_ids_to_tokens(id)) for id in range(num_known, len(template.tokenizer))][:_MOST_ADDED]
    if added:
        text = " and ".join(added)
        found.append(Probe(template.tokenizer(text)["input_ids"], text))  # type: ignore[arg-type]
    return found


_MOST_ADDED = 64


def _written(template: Template) -> Iterator[Probe]:
    for entry in read_yaml(Path(__file__).with_name("probes.yaml")):
        if "text" in entry:
            yield Probe(list(template.tokenizer(entry["text"])["input_ids"]), entry["text"])  # type: ignore[call-overload]
            continue
        messages = [Message(ROLES[role], text) for turn in entry["turns"] for role, text in turn.items()]
        sample = Sample(tuple(messages), entry.get("system", ""))
        try:
            ids = template.prompt_ids(messages, sample.system)
        except (BadRecord, UserError):
            continue
        yield Probe(ids, messages[-1].content, entry.get("answered", False), template.as_called(sample))
