"""Rows of conversations: what is cut, what is learnt, how a batch is padded."""

from typing import Any

import numpy as np
import pytest
import torch

from finery.data.rows.base import IGNORED, Row
from finery.data.rows.chat import Chat, share
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import Template, Turn


class Given(Template):
    """A template whose conversations are given, whatever the sample says."""

    def __init__(self, *conversations: list[Turn]) -> None:
        self.conversations = list(conversations)

    def encode(self, sample: Sample) -> list[list[Turn]]:
        if not self.conversations:
            raise BadRecord("no conversation")
        return self.conversations

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "") -> list[int]:
        return []

    @property
    def jinja(self) -> str | None:
        return None


def turn(num_source: int, num_target: int, first: int = 0, num_tail: int = 0) -> Turn:
    """Ids in one rising sequence."""
    ids = list(range(first, first + num_source + num_target + num_tail))
    return Turn(ids[:num_source], ids[num_source : num_source + num_target], tuple(ids[num_source + num_target :]))


def kept(row: Row) -> tuple[list[int], list[int]]:
    """Ids that are read, ids that are learnt."""
    learnt = row.labels != IGNORED
    assert np.array_equal(row.labels[learnt], row.ids[learnt])
    return row.ids[~learnt].tolist(), row.ids[learnt].tolist()


@pytest.mark.parametrize(
    ("lengths", "room", "shares"),
    [
        ((3000, 500), 2048, (1548, 500)),
        ((500, 3000), 2048, (500, 1548)),
        ((3000, 3000), 2048, (1024, 1024)),
        ((3000, 1500), 2048, (1366, 682)),
        ((10, 10), 2048, (10, 10)),
        ((10, 10), 20, (10, 10)),
        ((0, 30), 20, (0, 20)),
        ((30, 0), 20, (20, 0)),
        ((30, 30), 1, (1, 0)),
        ((1, 1), 1, (1, 0)),
    ],
)
def test_share(lengths: tuple[int, int], room: int, shares: tuple[int, int]) -> None:
    assert share(*lengths, room) == shares


def test_share_follows_the_rule_of_the_reference_everywhere() -> None:
    for source in range(0, 24):
        for target in range(0, 24):
            for room in range(1, 30):
                if 2 * target < room:
                    most = room
                elif 2 * source < room:
                    most = room - source
                else:
                    most = int(room * target / (source + target))
                expected = min(most, target)
                assert share(source, target, room) == (min(max(room - expected, 0), source), expected)


def test_what_fits_is_kept_whole() -> None:
    encoded = Chat(Given([turn(3, 2), turn(4, 2, 5, num_tail=1)]), 12).encode(Sample(()))
    (row,) = encoded.rows
    assert row.ids.tolist() == list(range(12))
    assert kept(row)[1] == [3, 4, 9, 10]
    assert (encoded.num_cut, encoded.reason, row.num_supervised) == (0, "", 4)


@pytest.mark.parametrize("cutoff_len", range(1, 26))
def test_kept_and_cut_make_the_whole(cutoff_len: int) -> None:
    turns = [turn(5, 3), turn(2, 6, 8, num_tail=2), turn(4, 2, 18)]
    encoded = Chat(Given(turns), cutoff_len).encode(Sample(()))
    num_kept = sum(len(row.ids) for row in encoded.rows)
    assert num_kept <= cutoff_len
    if encoded.rows:
        assert num_kept + encoded.num_cut == 24
        read, learnt = kept(encoded.rows[0])
        answers = {id for one in turns for id in one.target}
        assert set(learnt) <= answers
        assert not set(read) & answers
        assert encoded.rows[0].ids.tolist() == sorted(encoded.rows[0].ids.tolist())


def test_later_turns_get_what_is_left() -> None:
    """The reference's example: cutoff 12 on 4+4 three times keeps the first turn whole and shares the rest."""
    (row,) = Chat(Given([turn(4, 4), turn(4, 4, 8), turn(4, 4, 16)]), 12).encode(Sample(())).rows
    assert row.ids.tolist() == [*range(8), 8, 9, 12, 13]
    assert kept(row)[1] == [4, 5, 6, 7, 12, 13]


def test_nothing_follows_an_answer_that_was_cut() -> None:
    (row,) = Chat(Given([turn(1, 9, num_tail=3)]), 8).encode(Sample(())).rows
    assert kept(row) == ([0], [1, 2, 3, 4, 5, 6, 7])


def test_the_first_token_is_never_counted() -> None:
    row = Row(np.arange(4, dtype=np.int32), np.asarray([0, IGNORED, 2, 3], np.int32))
    assert row.num_supervised == 2


def test_a_sample_without_anything_to_learn_says_why() -> None:
    assert Chat(Given(), 8).encode(Sample(())).reason == "no conversation"
    encoded = Chat(Given([turn(3, 0)]), 8).encode(Sample(()))
    assert (encoded.rows, encoded.reason) == ((), "the answer is empty")
    encoded = Chat(Given([turn(300, 5)]), 8).encode(Sample(()))
    assert (encoded.rows, encoded.reason, encoded.num_cut) == ((), "nothing of the answer is left within cutoff_len", 297)
    encoded = Chat(Given([turn(0, 1)]), 8).encode(Sample(()))
    assert encoded.rows == ()  # the only token that could be learnt is the row's first


def test_of_several_conversations_those_with_an_answer_are_kept() -> None:
    encoded = Chat(Given([turn(3, 2)], [turn(300, 5)], [turn(2, 2)]), 8).encode(Sample(()))
    assert [row.ids.tolist() for row in encoded.rows] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


def test_collate_pads_on_the_right() -> None:
    rows = [Row(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in (([5, 6, 7], [-100, 6, 7]), ([8], [-100]))]
    batch: dict[str, Any] = Chat(Given(), 8).collate(rows)
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["input_ids"][1, 0].item() == 8
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
