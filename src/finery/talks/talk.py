"""A talk: what was said, what the model was told before, and which results it waits for. Plain data, with no model in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from finery.data.dialects.base import Call, read_calls, read_tools
from finery.data.sample import BadRecord, Message
from finery.errors import UserError


@dataclass
class Talk:
    """One conversation; `tools` is JSON text."""

    system: str = ""
    tools: str = ""
    messages: list[Message] = field(default_factory=list)

    @property
    def owed(self) -> list[Call]:
        """The calls whose results are to come."""
        num_results = next((place for place, message in enumerate(reversed(self.messages)) if message.role != "observation"), None)
        if num_results is None or (calling := self.messages[-1 - num_results]).role != "function":
            return []
        return read_calls(calling.content)[num_results:]

    @property
    def due(self) -> bool:
        """Whether an answer is."""
        return bool(self.messages) and self.messages[-1].role in ("user", "observation") and not self.owed

    def say(self, text: str) -> None:
        """The result of a call, if one is owed, else a question."""
        self.messages.append(Message("observation" if self.owed else "user", _whole(text)))

    def clear(self) -> None:
        """Begin anew, with the same system text and tools."""
        self.messages.clear()

    def take_back(self) -> None:
        """Undo what was said last; of an answer nothing is left, so that it is due once more."""
        if not any(message.role in ("assistant", "function") for message in self.messages):
            raise UserError("there is no answer yet")
        while self.messages:
            self.messages.pop()
            if self.due:
                return

    @property
    def question(self) -> str:
        """The last one; empty where none was asked."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")

    def forget_question(self) -> None:
        """Undo the last question and all that came after it."""
        places = [place for place, message in enumerate(self.messages) if message.role == "user"]
        if not places:
            raise UserError("there is no question yet")
        del self.messages[places[-1] :]

    def tell(self, system: str) -> None:
        """Another system text, from the next answer on."""
        self.system = _whole(system)

    def offer(self, tools: str) -> list[str]:
        """Other tools, from the next answer on; returns their names, raises `UserError` where it is no list of function schemas."""
        names = tool_names(tools)
        self.tools = tools if names else ""
        return names


def tool_names(tools: str) -> list[str]:
    """The names of function schemas; raises `UserError` where the text is no JSON list of them."""
    try:
        return [str(tool.get("function", tool)["name"]) for tool in read_tools(tools)]
    except BadRecord as error:
        raise UserError(str(error)) from None


def _whole(text: str) -> str:
    """A text that can be written as UTF-8; what a terminal or a command line could not read arrives as something else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("that holds bytes which are not UTF-8") from None
    return text
