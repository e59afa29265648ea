"""The proof that what is trained is what is served: token by token, a conversation at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finery.data.differences import difference, squeezed
from finery.data.jinja import FAULTS, num_shared
from finery.data.oddities import ANSWERS
from finery.data.rows.base import IGNORED, Row, RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import Message, Sample
from finery.data.spelled import MARK, TEXTS
from finery.data.template import Template, Turn
from finery.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Way = Literal["row", "turns", "refused"]
"""One row, one row per answer, or none."""
_UNCUT = 1 << 40
_CALL = '{"name": "look", "arguments": {}}'
_AROUND = 3
"""So many tokens are shown on each side of a place."""
_MOST_ASKED = 4
"""Of longer conversations, the saved folder is asked for so many of the first and of the last answers: each costs a rendering of all."""


@dataclass(frozen=True)
class Fault:
    """Where training and serving part, or what a user should know of how they agree."""

    what: str
    mend: str = ""
    kind: str = ""  # those of one kind are one finding
    fatal: bool = True


@dataclass(frozen=True)
class Proved:
    """What the proof says of a conversation."""

    way: Way
    reason: str = ""  # of a refusal
    faults: tuple[Fault, ...] = ()


class Proof:
    """Compares the rows of training with what serving feeds, and both with what the saved folder gives.

    Of every answer that is learnt: the tokens before it are the prompt of chat and API, also with the template as it is
    loaded from the saved folder, and are those that transformers renders there; it holds a token at which generation
    stops, and after the first one only what the template always writes; and the labels of the row are these answers and
    nothing else. A conversation that is one row is what transformers renders as a whole.
    """

    def __init__(self, template: Template, served: Template, saved: PreTrainedTokenizerBase, options: RowOptions | None = None) -> None:
        """`served` and `saved` are the template and the tokenizer as they are loaded from the saved folder."""
        self.template = template
        self.served = served
        self.saved = saved
        options = RowOptions(cutoff_len=_UNCUT) if options is None else options
        self.mask_history, self.train_on_prompt = options.mask_history, options.train_on_prompt
        self._rows = Chat(template, options.model_copy(update={"cutoff_len": _UNCUT, "truncation": "proportional"}))
        self._tails: dict[str, list[int]] = {}
        self._is_own = template.texts(Sample(()), prompt=False) is None  # the model's, tokenised whole

    def of_all(self) -> Iterator[Fault]:
        """What is wrong whatever the conversation."""
        if self.served.stop_ids != self.template.stop_ids:
            ours, theirs = (sorted(template.stop_ids) for template in (self.template, self.served))
            yield Fault(f"answers end at the tokens {ours}, and at {theirs} when served from the saved folder", kind="stops")

    def of(self, sample: Sample) -> Proved:
        """The proof of one conversation; never raises for what is in it."""
        encoded = self._rows.encode(sample)
        if not encoded.rows:
            return Proved("refused", encoded.reason)
        conversations = self.template.encode(sample)
        alone = conversations[0][0].alone
        way: Way = "turns" if alone else "row"
        conversations = [turns for turns in conversations[-1:] if turns] if self.mask_history else conversations
        places = self._places(sample, alone)
        neutral = self._neutral(sample)
        faults: list[Fault] = []
        if len(conversations) != len(encoded.rows):
            faults.append(Fault(f"{len(conversations)} conversations gave {len(encoded.rows)} rows", kind="rows"))
        for turns, row in zip(conversations, encoded.rows, strict=False):
            own = [places.pop(0) for _ in turns]
            faults += self._of_row(sample, turns, own, row, neutral is None)
        if neutral is not None:
            faults += self._of_spelling(sample, encoded.rows, neutral)
        elif not alone:
            faults += self._of_whole(sample, encoded.rows[0])
        return Proved(way, "", tuple(faults))

    def _places(self, sample: Sample, alone: bool) -> list[int]:
        """Where the answers stand that have a turn in some row."""
        places = [place for place, message in enumerate(sample.messages) if message.role in ANSWERS]
        if not alone:
            return places
        learnt = [place for place in places if sample.messages[place].train is not False] or places[-1:]
        return learnt[-1:] if self.mask_history else learnt

    def _of_row(self, sample: Sample, turns: Sequence[Turn], places: Sequence[int], row: Row, plain: bool) -> Iterator[Fault]:
        """A row's answers, then its labels as a whole."""
        late = self.template.late_end
        ids: list[int] = []
        labels: list[int] = []
        due = False
        asked = {*places[:_MOST_ASKED], *places[-_MOST_ASKED:]} if plain else set()
        for place, turn in zip(places, turns, strict=True):
            learn = turn.learn and (not self.mask_history or place == places[-1])
            before = [*ids, *turn.source]
            labels += turn.source if self.train_on_prompt else [IGNORED] * len(turn.source)
            if due and turn.source:
                labels[len(ids)] = IGNORED if late is None else late
            if learn:
                yield from self._of_answer(sample, place, before, turn, place in asked)
            ids = [*before, *turn.target, *turn.tail]
            labels += [*(turn.target if learn else [IGNORED] * len(turn.target)), *[IGNORED] * len(turn.tail)]
            due = learn and late is not None
        if late is not None:
            ids.append(late)
            labels.append(late if due else IGNORED)
        if not np.array_equal(row.ids, ids):
            yield Fault(f"the row has other tokens than its turns: {self._difference(row.ids.tolist(), ids)}", kind="tokens")
        elif not np.array_equal(row.labels, labels):
            place = int(np.flatnonzero(row.labels != np.asarray(labels))[0])
            shown = self._shown(ids, place)
            yield Fault(f"the label of token {place} is {row.labels[place]} and should be {labels[place]} (at {shown})", kind="label")

    def _of_answer(self, sample: Sample, place: int, before: list[int], turn: Turn, asks: bool) -> Iterator[Fault]:
        """What stands before an answer, and how it ends. The first difference counts; others follow from it.

        With `asks`, the saved folder is asked, too.
        """
        thinks = self.template.asks_thought(sample, place)
        asked = replace(sample, messages=sample.messages[:place])
        servers = [(self.template, "chat and API feed"), (self.served, "is fed when the saved folder is served")]
        for server, named in servers if asks else servers[:1]:
            try:
                fed = server.prompt_ids(list(asked.messages), sample.system, sample.tools, thinks)
            except UserError as error:
                yield Fault(f"what {named} before answer {place} is refused: {error}", kind=named)
                return
            if fed != before:
                told = self._difference(before, fed, "in training")
                yield Fault(f"answer {place} is learnt after other tokens than what {named}: {told}", kind=named)
                return
        if asks:
            yield from self._of_folder(asked, before, thinks)
        yield from self._of_stop(sample.messages[place], turn)
        yield from self._of_text(sample.messages[place], turn)

    def _of_folder(self, asked: Sample, before: list[int], thinks: bool) -> Iterator[Fault]:
        """What other programs make of the saved template."""
        texts = self.template.texts(asked, True, thinks)
        theirs = self._rendered(asked, thinks, prompt=True, tokens=texts is None)
        if isinstance(theirs, Fault):
            yield theirs
        elif texts is None and theirs != before:
            told = self._difference(before, list(theirs), "in training")
            yield Fault(f"the saved chat template, tokenised by transformers, gives other tokens: {told}", kind="saved")
        elif texts is not None and theirs != "".join(texts):
            yield self._other_text("".join(texts), str(theirs))

    def _other_text(self, ours: str, theirs: str) -> Fault:
        place = num_shared(ours, theirs)
        around = [text[max(place - 12, 0) : place + 24] for text in (ours, theirs)]
        told = f"the saved chat template writes another text: {around[1]!r} for {around[0]!r}"
        return Fault(told, kind="text")

    def _of_stop(self, message: Message, turn: Turn) -> Iterator[Fault]:
        """A token at which generation stops, and nothing learnt after it but the template's fixed tail."""
        stops = [at for at, id in enumerate(turn.target) if id in self.template.stop_ids]
        if self.template.late_end is not None:  # the label that follows is compared with the row's
            if self.template.late_end not in self.template.stop_ids:
                yield Fault("generation does not stop at the token that closes a conversation", kind="stop")
            return
        learnt = self._text(turn.target[-_AROUND:])
        if not stops:
            # some named templates, as the reference has them, write no end after calls or at all
            told = f"nothing that is learnt ends generation: the answer ends with {learnt!r}, and the model will not know where to stop"
            yield Fault(told, "choose another 'template', or give it an end and its 'stop_words' in a file", "stop", fatal=self._is_own)
            return
        rest, tail = turn.target[stops[0] + 1 :], self._tail(message.role)
        if rest == tail:
            return
        if rest[len(rest) - len(tail) :] == tail and len(stops) > 1 and (self.template.split is False or not self.saved.is_fast):
            word = self._text([turn.target[stops[0]]])
            mend = "take it out of the text, or leave 'split_special_tokens' away"
            yield Fault(f"the answer spells {word!r}, at which generation stops", mend, kind="early", fatal=False)
        else:
            yield Fault(f"after the token that ends generation, more is learnt: {self._text(rest)!r}", kind="after")

    def _tail(self, role: str) -> list[int]:
        """What is learnt after the end of every answer; the model's own template masks it."""
        if self._is_own:
            return []
        if role not in self._tails:
            answer = Message("function", _CALL) if role == "function" else Message("assistant", "An answer")
            target = self.template.encode(Sample((Message("user", "A question"), answer)))[0][0].target
            stop = next((at for at, id in enumerate(target) if id in self.template.stop_ids), len(target))
            self._tails[role] = target[stop + 1 :]
        return self._tails[role]

    def _of_text(self, message: Message, turn: Turn) -> Iterator[Fault]:
        """What stands in the data and is not learnt, though no key says so."""
        content = message.content if message.role == "assistant" else message.before_calls
        inner, closed, rest = content.partition("</think>")
        thought = message.thought or (inner.partition("<think>")[2] if closed else "")
        said = rest if closed else content
        texts = [] if self.template.drops_thoughts else [(thought, "the thought of this answer", "keeps thoughts")]
        learnt = squeezed(self._text(turn.target))
        for text, named, wanted in (*texts, (said, "a part of this answer", "writes it")):
            ids = self.template.tokenise.one(text.strip())
            if squeezed(self._text(ids)) not in learnt:
                mend = f"choose a 'template' that {wanted}, or take it out of the data"
                yield Fault(f"the template strips {named}: {text.strip()[:40]!r} is not learnt", mend, f"strips {named}", fatal=False)

    def _of_whole(self, sample: Sample, row: Row) -> Iterator[Fault]:
        """A conversation in one row: what transformers renders, but for an ending that the template leaves out of the last answer."""
        ours, thinks = row.ids.tolist(), self.template.asks_thought(sample, len(sample.messages) - 1)
        texts = self.template.texts(sample, prompt=False)
        theirs = self._rendered(sample, thinks, prompt=False, tokens=texts is None)
        if isinstance(theirs, Fault):
            yield theirs
        elif texts is None:
            if theirs != ours[: len(theirs)] or any(id not in self.template.stop_ids for id in ours[len(theirs) :]):
                told = self._difference(ours, list(theirs), "in training")
                yield Fault(f"the conversation as a whole is not what transformers renders: {told}", kind="whole")
            elif (marks := self.template.answers_of(sample)) is not None:
                yield from self._of_marks(sample, row, marks)
        else:
            yield from [self._other_text("".join(texts), str(theirs))] if theirs != "".join(texts) else self._seams(texts)

    def _of_marks(self, sample: Sample, row: Row, marks: Sequence[bool]) -> Iterator[Fault]:
        """What is learnt lies between the template's own marks, and all between them that is an answer's is learnt."""
        learnt = row.labels != IGNORED
        inside = np.zeros(len(learnt), bool)
        inside[: len(marks)] = marks[: len(learnt)]
        outside = learnt & ~inside
        outside[len(marks) :] = False  # an ending that the template leaves out
        all_learnt = not self.mask_history and not any(message.train is False for message in sample.messages)
        missed = inside & ~learnt if all_learnt else np.zeros(len(learnt), bool)
        missed[1:] &= ~(missed[:-1] | np.isin(row.ids[:-1], list(self.template.stop_ids)))  # white space after the end
        for places, what in ((outside, "is learnt outside"), (missed, "is not learnt between")):
            if places.any():
                place = int(np.flatnonzero(places)[0])
                yield Fault(
                    f"token {place} {what} the template's generation marks (at {self._shown(row.ids.tolist(), place)})", kind="marks"
                )

    def _seams(self, texts: Sequence[str]) -> Iterator[Fault]:
        """Where pieces that are tokenised apart give other tokens than one text."""
        tokenise = self.template.tokenise
        texts = [text for text in texts if text]
        apart = tokenise.ids(texts)
        whole = tokenise.one("".join(texts))
        if whole == list(chain.from_iterable(apart)):
            return
        joined = tokenise.ids([one + other for one, other in pairwise(texts)])
        told: set[str] = set()
        for (one, other), together in zip(pairwise(apart), joined, strict=True):
            left = self._text(one[-1:])
            if together != [*one, *other] and left not in told:
                told.add(left)
                difference = self._difference([*one, *other], together, "piece by piece", "as one text")
                kind = "seam after a text" if any(map(str.isalnum, left)) else f"seam after {left!r}"
                yield Fault(f"a seam after {left!r}: {difference}", _SEAM, kind, fatal=False)
        if not told:
            difference = self._difference(list(chain.from_iterable(apart)), whole, "piece by piece", "as one text")
            yield Fault(f"a seam: {difference}", _SEAM, "seam", fatal=False)

    def _neutral(self, sample: Sample) -> Sample | None:
        """The sample without the words of special tokens; nothing where its texts spell none."""
        marked = self.template.marked(sample)
        if marked is sample:
            return None

        def plain(message: Message) -> Message:
            return replace(message, **{name: getattr(message, name).replace(MARK, "·") for name in TEXTS})

        system, tools = (text.replace(MARK, "·") for text in (marked.system, marked.tools))
        return replace(marked, messages=tuple(map(plain, marked.messages)), system=system, tools=tools)

    def _of_spelling(self, sample: Sample, rows: Sequence[Row], neutral: Sample) -> Iterator[Fault]:
        """Words that spell special tokens steer nothing: the same control tokens stand in the rows as without them."""
        others = self._rows.encode(neutral).rows
        ours, theirs = ([self._controls(row) for row in some] for some in (rows, others))
        if ours != theirs:
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
            told = self._difference(*pairs[0], "with", "without") if pairs else f"{len(ours)} rows with, {len(theirs)} without"
            yield Fault(f"words that spell special tokens are read as tokens: {told}", kind="spelled")
        yield from self.of(neutral).faults
        marked = self.template.marked(sample)
        texts = [marked.system, marked.tools, *(getattr(message, name) for message in marked.messages for name in TEXTS)]
        words = sorted({word for text in texts for word in self.template.spelled.every.marked_in(text)})
        told = f"spells {', '.join(map(repr, words[:3]))}: text here, in training and serving; other servers read tokens"
        yield Fault(told, "take it out, if the model is served elsewhere", "spells", fatal=False)

    def _controls(self, row: Row) -> list[int]:
        added = self.template.tokenizer.added_tokens_decoder
        return [id for id in row.ids.tolist() if id in added]

    def _rendered(self, sample: Sample, thinks: bool, prompt: bool, tokens: bool) -> Any:
        """What transformers makes of a conversation with the saved folder: token ids, or the text."""
        called = self.template.as_called(sample, thinks)
        try:
            return self.saved.apply_chat_template(**called, tokenize=tokens, return_dict=False, add_generation_prompt=prompt)
        except FAULTS as error:
            return Fault(f"the saved chat template cannot be rendered: {error}", kind="rendered")

    def _difference(self, ours: list[int], theirs: list[int], here: str = "here", there: str = "there") -> str:
        return difference(self.template.tokenizer, ours, theirs, here, there)

    def _shown(self, ids: list[int], place: int) -> str:
        return repr(self._text(ids[max(place - _AROUND, 0) : place + _AROUND + 1]))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(list(ids)))


_SEAM = "other servers, which tokenise the whole text, feed those"
