"""Samples as questions: the prompt that a chat would feed before the last answer, and the answer that the data have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from finery.data.mixing import Part
from finery.data.rows.base import RowOptions
from finery.data.sample import BadRecord, Sample
from finery.data.sources import Source
from finery.data.template import Template
from finery.errors import UserError
from finery.log import get_logger, plural

log = get_logger(__name__)

MEDIA = "it comes with images, videos or audios, which are not read yet"


@dataclass(frozen=True)
class Question:
    """What is asked, and the label: what the data have as its answer, where they have one."""

    place: int  # in the set
    prompt_ids: Sequence[int]
    label: str | None


@dataclass
class Questions:
    """Those of one set, in its order; iterate once. What was left out or cut is counted on the way."""

    part: Part
    sources: Sequence[Source]
    template: Template
    options: RowOptions
    room: int  # tokens that a prompt may have
    skip_special_tokens: bool
    left_out: Counter[str] = field(default_factory=Counter)
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.part)

    def __iter__(self) -> Iterator[Question]:
        for place in range(len(self.part)):
            numbers, records = self.part.locate(np.asarray([place], np.int64))
            source, record = self.sources[int(numbers[0])], int(records[0])
            try:
                question = self._of(place, source.sample(record))
            except BadRecord as error:
                self.left_out[str(error)] += 1
                continue
            except UserError as error:
                raise UserError(*(f"{source.told(record)}: {line}" for line in error.complaints)) from None
            if question is not None:
                yield question

    def _of(self, place: int, sample: Sample) -> Question | None:
        """Nothing where `truncation: drop` takes it; raises `BadRecord` where it cannot be asked."""
        if sample.has_media:
            raise BadRecord(MEDIA)
        template, messages = self.template, list(sample.messages)
        thinks, label = False, None
        if not sample.unanswered:
            last = len(messages) - 1
            thinks = template.asks_thought(sample, last)
            label = self._label(sample)
            messages = messages[:last]
        try:
            ids = template.prompt_ids(messages, sample.system, sample.tools, thinks)
        except UserError as error:
            raise BadRecord(str(error)) from None
        if len(ids) > self.room:
            if self.options.truncation == "error":
                raise UserError(f"the prompt has {len(ids):,} tokens, more than {self.room:,}, and 'truncation: error' asks to stop")
            if self.options.truncation == "drop":
                raise BadRecord(f"its prompt is longer than {self.room:,} tokens, and 'truncation: drop' leaves such out")
            self.num_cut += 1
            ids = ids[-self.room :]  # the question and the beginning of the answer's turn stand at the end
        return Question(place, ids, label)

    def _label(self, sample: Sample) -> str:
        """The last answer as it is trained, without what ends it; calls and thoughts as the template writes them."""
        turn = self.template.encode(sample)[-1][-1]
        stops = self.template.stop_ids
        end = next((at for at in range(len(turn.target) - 1, -1, -1) if turn.target[at] in stops), len(turn.target))
        kept = turn.target[:end] if not self._text(turn.target[end + 1 :]).strip() else turn.target
        return self._text(kept)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(list(ids), skip_special_tokens=self.skip_special_tokens))

    def tell(self, name: str) -> None:
        """What was left out, and what was cut."""
        for reason, count in self.left_out.most_common(5):
            log.warning("%s: %s not asked: %s", name, plural(count, "sample"), reason)
        if self.num_cut:
            told = "only the last %s tokens of %s were asked: they are longer than 'cutoff_len' or the model allow"
            log.warning(f"%s: {told}", name, f"{self.room:,}", plural(self.num_cut, "prompt"))
