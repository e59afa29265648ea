"""The tokenizer's own Jinja template, with a verified mask of the assistant's tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from finery.compat import compiled_chat_template
from finery.data.generation_marks import has_marks, marked, right_ends
from finery.data.jinja_fixed import settle
from finery.data.messages import as_dicts, as_schemas, with_call_ids
from finery.data.sample import BadRecord, Message, Sample
from finery.data.spelled import without_marks
from finery.data.template import Template, TemplateOptions, Turn
from finery.data.tokenise import Asking
from finery.errors import UserError
from finery.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_ANSWER = "A short probe answer"
_PROBE_THOUGHT = "A short probe thought"
_PLAIN_KEYS = {"role", "content"}
_QUESTION = {"role": "user", "content": "A question"}
_CALL = Message("function", '{"name": "look", "arguments": {"at": "it"}}')


FAULTS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What a template's code may raise."""

log = get_logger(__name__)


@dataclass(frozen=True)
class _Ending:
    """The marks that close an answer and are learnt, text before them, and how many tokens follow them at most."""

    marks: list[int]
    lead: tuple[int, ...] = ()
    num_after: int = 0

    def find(self, ids: list[int], start: int, limit: int, size: int) -> int | None:
        """Where the last marks in `ids[start:limit]` ends, if they close a turn that ends at `size`."""
        end = _last(ids, self.marks, start, limit)
        return end if end is not None and size - end <= self.num_after else None


class JinjaTemplate(Template):
    """Renders with the model's own template and trains on what serving will feed.

    A conversation is one row where, for every answer, the prompt that serving feeds and the finished answer are a
    prefix of the whole, in tokens. Where the template rewrites history, each answer becomes a row of its own.
    """

    name = "the model's own"
    _reads_thoughts = False
    _call_ids = False

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: TemplateOptions | None = None) -> None:
        self.options = options or TemplateOptions()
        super().__init__(tokenizer, self.options.split_special_tokens)
        self.drops_thoughts = self.options.enable_thinking is False
        settle(tokenizer, self.options)
        self._plain_render = compiled_chat_template(tokenizer)
        self._markers = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
        self._eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
        try:
            self._ending = self._find_ending()
        except BadRecord as error:
            raise UserError(f"'template' is needed, since even a question and its answer do not fit the model's own: {error}") from None
        self.marks_are_right = self._follow_marks()
        self._call_ending = self._find_call_ending()
        self._reads_thoughts = self._find_thoughts()
        self.stop_ids = frozenset([*self._ending.marks[-1:], *self._call_ending.marks[-1:], *self._eos])
        self._keep_apart(self._header())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain_render": None}  # compiled code does not travel

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plain_render = compiled_chat_template(self.tokenizer)

    @property
    def told(self) -> str:
        """As for Template."""
        return "the model's own template"

    @property
    def shape(self) -> str:
        """What becomes of thoughts and of special tokens in texts; all else stands in the template."""
        return repr((self.options.enable_thinking, self.split))

    @property
    def jinja(self) -> str | None:
        """The tokenizer's own; nothing where it has several, which are then saved as they are."""
        return self.tokenizer.chat_template if isinstance(self.tokenizer.chat_template, str) else None

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "", thinks: bool = False) -> list[int]:
        """The rendering with the generation prompt, tokenised whole; raises `UserError` where the template refuses."""
        sample = self.marked(Sample(tuple(messages), system, tools))
        asked = thinks if self.options.enable_thinking is None else None
        try:
            return self._ids(self._render(self.dicts(sample), sample.tools, prompt=True, thinks=asked))
        except BadRecord as error:
            raise UserError(without_marks(str(error))) from None

    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """One conversation where history stands, else one per answer."""
        sample = self.marked(sample)
        messages = self.dicts(sample)
        thinks = self._thinks(messages)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadRecord("there is no answer to learn")
        texts = [self._render(messages[:place], sample.tools, True, thinks) for place in answers]
        texts += [self._render(messages[: place + 1], sample.tools, thinks=thinks) for place in answers]
        ids = yield texts
        prompts, finished = ids[: len(answers)], ids[len(answers) :]
        turns = self._whole(messages, answers, prompts, finished)
        if turns is None:
            sides = list(zip(texts, ids, strict=True))
            each = zip(answers, sides[: len(answers)], sides[len(answers) :], strict=True)
            rows = [[self._alone(messages[: place + 1], before, after, sample.tools, thinks)] for place, before, after in each]
        else:
            rows = [turns]
        for place, turn in zip(answers, (turn for row in rows for turn in row), strict=True):
            self._see_calls(messages[place], turn)
        if any(message.train is False for message in sample.messages):
            spoken = [message for message in sample.messages if message.role in ("assistant", "function")]
            rows = _only_learnt(rows, [message.train is not False for message in spoken])
        return rows

    def _thinks(self, messages: Sequence[dict[str, Any]]) -> bool | None:
        """Whether the model is told to think, where each sample says so by itself."""
        if self.options.enable_thinking is not None:
            return None
        last = next((message for message in reversed(messages) if message["role"] == "assistant"), {})
        return bool(last.get("reasoning_content")) or "</think>" in str(last.get("content"))

    def _see_calls(self, message: dict[str, Any], turn: Turn) -> None:
        """Some templates drop tool calls without a word; an empty answer is not what should be learnt."""
        thought = self.spelled.unmark(message.get("reasoning_content", "").strip())
        if thought and thought not in self._text(turn.source[-1:] + turn.target):
            raise BadRecord("the model's chat template does not write the thought of this answer")
        if "tool_calls" in message and self.stop_ids.intersection(turn.target[:-1]):
            raise BadRecord("the model's chat template ends this turn before its call: no server would go on to the call")
        for call in message.get("tool_calls", ()):
            if self.spelled.unmark(call["function"]["name"]) not in self._text(turn.target):
                raise BadRecord("the model's chat template does not write tool calls")

    def _whole(
        self, messages: list[dict[str, Any]], answers: list[int], prompts: list[list[int]], finished: list[list[int]]
    ) -> list[Turn] | None:
        """The whole conversation as turns, or nothing where some prompt or finished answer is not a prefix of it."""
        whole, turns, begin = finished[-1], [], 0
        for place, prompt, done in zip(answers, prompts, finished, strict=True):
            start, ending = len(prompt), self._ending_of(messages[place])
            if start < begin or whole[:start] != prompt:
                return None
            if place == answers[-1]:
                target, tail = self._closed(whole[start:], messages[place])
                return [*turns, Turn(whole[begin:start], target, tail)]
            # a template may leave the last answer open: then its ending is the first of what follows in the whole
            end = ending.find(whole, start, num_shared(whole, done) + len(ending.marks), len(done))
            if end is None:
                return None
            turns.append(Turn(whole[begin:start], whole[start:end]))
            begin = end
        return None

    def _alone(
        self, messages: list[dict[str, Any]], before: tuple[str, list[int]], after: tuple[str, list[int]], tools: str, thinks: bool | None
    ) -> Turn:
        """The last of `messages` after exactly the prompt that serving feeds; `before` and `after` it, text and tokens."""
        (opening, prompt), (closed, finished) = before, after
        if finished[: len(prompt)] == prompt:
            rest = finished[len(prompt) :]
        elif closed.startswith(opening):
            rest = self._ids(closed[len(opening) :])
        else:
            header = self._render(messages[:-1], tools, thinks=thinks)
            rest = self._continued(messages[-1], prompt, finished if closed.startswith(header) else [])
        target, tail = self._closed(rest, messages[-1])
        return Turn(prompt, target, tail, alone=True)

    def _continued(self, message: dict[str, Any], prompt: list[int], finished: list[int]) -> list[int]:
        """The answer where the prompt is not the beginning of the finished turn, such as one that opens a thought.

        `finished` is empty where the template rewrites what comes before the answer, too.
        """
        content = str(message["content"])
        common = num_shared(prompt, finished)
        rest, extra = finished[common:], prompt[common:]
        if not finished and "tool_calls" in message:
            raise BadRecord("the model's chat template rewrites what comes before this call: what to learn cannot be told")
        if self.spelled.unmark(content.strip()) not in self._text(rest):
            rest = [*self._ids(content), *self._ending.lead]  # the template leaves a part out, such as the thought, or rewrites everything
        if not finished:
            return rest
        overlap = next((size for size in range(len(extra), 0, -1) if rest[:size] == extra[-size:]), 0)
        opened = re.search(r"<([\w:]+)>\s*$", self._text(extra))
        if opened and not overlap and (closing := f"</{opened[1]}>") not in self._text(rest):
            return self._ids(f"\n{closing}\n\n") + rest  # an answer without a thought closes the one that the prompt opens
        return rest[overlap:]

    def _closed(self, rest: list[int], message: dict[str, Any]) -> tuple[list[int], tuple[int, ...]]:
        """An answer up to its ending, which is added where the template does not write it, and what follows."""
        ending = self._ending_of(message)
        end = ending.find(rest, 0, len(rest), len(rest))
        return (rest + ending.marks, ()) if end is None else (rest[:end], tuple(rest[end:]))

    def _ending_of(self, message: dict[str, Any]) -> _Ending:
        return self._call_ending if "tool_calls" in message else self._ending

    def _find_ending(self) -> _Ending:
        """The first marker after an answer, together with the end token where that follows directly.

        What history keeps counts first. A template that leaves the last answer open closes it with what stands
        before the next question; where nothing does, the end token is added.
        """
        answer = {"role": "assistant", "content": _PROBE_ANSWER}
        after = self._render([_QUESTION, answer]).rpartition(_PROBE_ANSWER)[2]
        later = self._render([_QUESTION, answer, {"role": "user", "content": "Another"}]).rpartition(_PROBE_ANSWER)[2]
        ids, following = self._ids(after), self._ids(later)
        for kept in (num_shared(ids, following), len(ids)):
            first = next((at for at in range(kept) if ids[at] in self._markers), None)
            if first is not None:
                run = next((at for at in range(first, kept) if ids[at] not in self._markers), kept)
                end = _last(ids, self._eos, first, run) or first + 1
                return _Ending(ids[first:end], tuple(ids[:first]), len(ids) - end)
        following = self._ids(later.removeprefix(after))[:1]
        return _Ending(following if self._markers.intersection(following) else self._eos, tuple(ids))

    def _follow_marks(self) -> bool:
        """Whether the template's own marks of what the model writes are right; their end of an answer counts, then."""
        if not has_marks(self.tokenizer):
            return False
        messages = [_QUESTION, {"role": "assistant", "content": _PROBE_ANSWER}] * 2
        ids, mask = marked(self.tokenizer, {"conversation": messages})
        prompts = [self._ids(self._render(messages[:size], prompt=True)) for size in (1, 3)]
        ends = right_ends(ids, mask, prompts, self._markers)
        if ends is None:
            log.info("the {% generation %} marks of the chat template are not where its prompts end: they are not followed")
            return False
        if ids[ends[0] - 1] != self._ending.marks[-1]:
            self._ending = _Ending(ids[ends[0] - 1 : ends[0]], num_after=len(ids) - ends[1])
        return True

    def answers_of(self, sample: Sample) -> list[bool] | None:
        """For each token of the whole conversation, whether the template's marks call it an answer's.

        Nothing where they are not right, or where they were not tried: with calls and thoughts.
        """
        plain = all(message.role != "function" and not message.thought and "</think>" not in message.content for message in sample.messages)
        return marked(self.tokenizer, self.as_called(sample))[1] if self.marks_are_right and plain else None

    def _find_call_ending(self) -> _Ending:
        """As an answer's, unless the template closes a call in another way."""
        messages = as_dicts([Message("user", "A question"), _CALL, Message("observation", "found")])
        try:
            self._render(messages)
        except BadRecord:
            messages = with_call_ids(messages)
            self._call_ids = True
        try:
            prompt, finished, longer = (self._ids(self._render(messages[:size], prompt=size == 1)) for size in (1, 2, 3))
        except BadRecord:
            self._call_ids = False
            return self._ending
        for stop in (self._ending.marks[-1:], self._eos):
            end = _last(finished, stop, len(finished) - 3, len(finished))
            if end is not None:
                return _Ending(stop, num_after=len(finished) - end)
        if len(longer) <= len(finished) or longer[: len(finished)] != finished:
            return self._ending
        following = longer[len(finished)]
        if following in self._markers and following not in prompt:
            return _Ending([following])  # such as GLM's <|observation|>
        return _Ending(finished[-1:]) if self._markers.intersection(finished[-1:]) else self._ending

    def _header(self) -> str:
        """What opens turns: the text before a question and between it and its answer, without a thought that the prompt opens."""
        before, _, after = self._render([_QUESTION], prompt=True).partition(_QUESTION["content"])
        return before + re.sub(r"<[\w:]+>\s*(</[\w:]+>\s*)?$", "", after)

    def dicts(self, sample: Sample) -> list[dict[str, Any]]:
        """A sample's messages as the template gets them."""
        found = as_dicts(sample.messages, sample.system, self._reads_thoughts, drop_thoughts=self.drops_thoughts)
        return with_call_ids(found) if self._call_ids else found

    def asks_thought(self, sample: Sample, place: int) -> bool:
        """Whether its last answer has a thought, where each sample says so by itself."""
        return bool(self._thinks(self.dicts(sample)))

    def as_called(self, sample: Sample, thinks: bool = False) -> dict[str, Any]:
        """As for Template."""
        asked = thinks if self.options.enable_thinking is None else None
        return {"conversation": self.dicts(sample), "tools": as_schemas(sample.tools), **_arguments(asked)}

    def _find_thoughts(self) -> bool:
        """Whether the template writes a thought that stands apart; else it goes before the answer, in the words that most models use."""
        answer = {"role": "assistant", "content": _PROBE_ANSWER, "reasoning_content": _PROBE_THOUGHT}
        try:
            return _PROBE_THOUGHT in self._render([_QUESTION, answer])
        except BadRecord:
            return False

    def _render(self, messages: list[dict[str, Any]], tools: str = "", prompt: bool = False, thinks: bool | None = None) -> str:
        arguments = _arguments(thinks)
        try:
            if self._plain_render is not None and not tools and all(message.keys() <= _PLAIN_KEYS for message in messages):
                return self._plain_render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **arguments)
            schemas = as_schemas(tools)
            return str(self.tokenizer.apply_chat_template(messages, schemas, tokenize=False, add_generation_prompt=prompt, **arguments))
        except FAULTS as error:
            raise BadRecord(f"the model's chat template refuses it: {error}") from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenise.one(text)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def _arguments(thinks: bool | None) -> dict[str, Any]:
    """What else a template gets; `thinks` is whether the model is told to think, where each sample says so."""
    return {} if thinks is None else {"enable_thinking": thinks}


def num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens or letters two begin with in common."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:  # as is usual, and quickly seen
        return size
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _last(ids: list[int], ending: list[int], start: int, limit: int) -> int | None:
    """Where the last `ending` that begins at `start` or later and ends by `limit` ends."""
    size = len(ending)
    ends = (at for at in range(min(limit, len(ids)), start + size - 1, -1) if size and ids[at - size : at] == ending)
    return next(ends, None)


def _only_learnt(rows: list[list[Turn]], learn: list[bool]) -> list[list[Turn]]:
    """Turns that are only read say so; a row of its own that holds nothing to learn is not needed."""
    flags = iter(learn)
    marked = [[replace(turn, learn=next(flags)) for turn in row] for row in rows]
    return [row for row in marked if any(turn.learn for turn in row)] or marked[-1:]
