"""Rows of conversations: what is cut, what is learnt, how a batch is padded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finery.data.rows.base import IGNORED, Cut, Encoded, Row, RowOptions
from finery.data.rows.chat import Chat, share
from finery.data.sample import Message, Sample
from finery.data.template import Turn
from finery.errors import UserError
from letters import Given


def turn(num_source: int, num_target: int, first: int = 0, num_tail: int = 0) -> Turn:
    """Ids in one rising sequence."""
    ids = list(range(first, first + num_source + num_target + num_tail))
    return Turn(ids[:num_source], ids[num_source : num_source + num_target], tuple(ids[num_source + num_target :]))


def chat(cutoff_len: int, *conversations: list[Turn], late_end: int | None = None, **options: Any) -> Chat:
    """What encodes these conversations."""
    return Chat(Given(*conversations, late_end=late_end), RowOptions(cutoff_len=cutoff_len, **options))


def encode(cutoff_len: int, *conversations: list[Turn], late_end: int | None = None, **options: Any) -> Encoded:
    """What the conversations become."""
    return chat(cutoff_len, *conversations, late_end=late_end, **options).encode(Sample(()))


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
    encoded = encode(12, [turn(3, 2), turn(4, 2, 5, num_tail=1)])
    (row,) = encoded.rows
    assert row.ids.tolist() == list(range(12))
    assert kept(row)[1] == [3, 4, 9, 10]
    assert (encoded.num_cut, encoded.reason, row.num_supervised) == (0, "", 4)


@pytest.mark.parametrize("cutoff_len", range(1, 26))
def test_kept_and_cut_make_the_whole(cutoff_len: int) -> None:
    turns = [turn(5, 3), turn(2, 6, 8, num_tail=2), turn(4, 2, 18)]
    encoded = encode(cutoff_len, turns)
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
    (row,) = encode(12, [turn(4, 4), turn(4, 4, 8), turn(4, 4, 16)]).rows
    assert row.ids.tolist() == [*range(8), 8, 9, 12, 13]
    assert kept(row)[1] == [4, 5, 6, 7, 12, 13]


def test_nothing_follows_an_answer_that_was_cut() -> None:
    (row,) = encode(8, [turn(1, 9, num_tail=3)]).rows
    assert kept(row) == ([0], [1, 2, 3, 4, 5, 6, 7])


def test_the_first_token_is_never_counted() -> None:
    row = Row(np.arange(4, dtype=np.int32), np.asarray([0, IGNORED, 2, 3], np.int32))
    assert row.num_supervised == 2


def test_a_sample_without_anything_to_learn_says_why() -> None:
    assert encode(8).reason == "no conversation"
    assert (found := encode(8, [turn(3, 0)])).reason == "the answer is empty, or none is to be learnt"
    assert (found.rows, found.num_cut) == ((), 3)
    found = encode(8, [turn(300, 5)])
    assert (found.rows, found.reason, found.num_cut) == ((), "longer than cutoff_len 8: nothing of the answer is left", 305)
    found = encode(8, [turn(300, 5)], truncation="drop")
    assert (found.rows, found.reason, found.num_cut) == ((), "longer than cutoff_len 8: left out, as 'truncation: drop' asks", 305)
    assert encode(8, [turn(0, 1)]).rows == ()  # the only token that could be learnt is the row's first
    unanswered = Sample((Message("user", "a"),), unanswered="the conversation ends with a question")
    assert chat(8, [turn(3, 2)]).encode(unanswered).reason == "the conversation ends with a question"


def test_of_several_conversations_those_with_an_answer_are_kept() -> None:
    encoded = encode(8, [turn(3, 2)], [turn(300, 5)], [turn(2, 2)])
    assert [row.ids.tolist() for row in encoded.rows] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


TWO_TURNS = [turn(3, 2), turn(2, 4, 5)]  # eleven tokens, of which 3, 4 and 7 to 10 are answers


@pytest.mark.parametrize(
    ("truncation", "rows", "num_cut", "lost"),
    [
        ("proportional", [[*range(6), 7, 8]], 3, Cut.END_LOST | Cut.HEADER_LOST),
        ("drop", [], 11, Cut.NOTHING),
        ("keep_start", [range(8)], 3, Cut.END_LOST),
        ("keep_end", [range(3, 11)], 3, Cut.HEADER_LOST),
        ("split", [range(8), range(8, 11)], 0, Cut.END_LOST | Cut.HEADER_LOST),
    ],
)
def test_what_becomes_of_a_row_that_is_too_long(truncation: str, rows: list[Sequence[int]], num_cut: int, lost: int) -> None:
    found = encode(8, TWO_TURNS, truncation=truncation)
    assert [row.ids.tolist() for row in found.rows] == [list(row) for row in rows]
    assert (found.num_cut, found.cut) == (num_cut, lost)
    for row in found.rows:
        assert set(kept(row)[1]) == {3, 4, 7, 8, 9, 10} & set(row.ids.tolist())
    assert found.num_supervised == sum(row.num_supervised for row in found.rows)
    assert [row.ids.tolist() for row in encode(11, TWO_TURNS, truncation=truncation).rows] == [list(range(11))]


def test_a_part_without_an_answer_is_cut_away() -> None:
    found = encode(4, [turn(9, 5)], truncation="split")
    assert [row.ids.tolist() for row in found.rows] == [[8, 9, 10, 11], [12, 13]]
    assert found.num_cut == 8


def test_a_row_that_is_too_long_can_stop_the_run() -> None:
    with pytest.raises(UserError, match="the row has 11 tokens, more than cutoff_len 8, and 'truncation: error' asks to stop"):
        encode(8, TWO_TURNS, truncation="error")
    assert len(encode(11, TWO_TURNS, truncation="error").rows) == 1


def test_which_tokens_are_learnt() -> None:
    assert kept(encode(99, TWO_TURNS).rows[0])[1] == [3, 4, 7, 8, 9, 10]
    assert kept(encode(99, TWO_TURNS, mask_history=True).rows[0])[1] == [7, 8, 9, 10]
    assert kept(encode(99, TWO_TURNS, train_on_prompt=True).rows[0])[1] == list(range(11))
    only_first = [TWO_TURNS[0], replace(TWO_TURNS[1], learn=False)]
    assert kept(encode(99, only_first).rows[0])[1] == [3, 4]
    assert encode(99, only_first, mask_history=True).reason == "the answer is empty, or none is to be learnt"
    several = encode(99, TWO_TURNS[:1], TWO_TURNS, mask_history=True)  # a template that rewrites history
    assert [row.ids.tolist() for row in several.rows] == [list(range(11))]


def test_with_masked_history_the_last_turns_are_kept() -> None:
    """The reference's example: cutoff 12 on 4+4 three times."""
    (row,) = encode(12, [turn(4, 4), turn(4, 4, 8), turn(4, 4, 16)], mask_history=True).rows
    assert row.ids.tolist() == [8, 9, 12, 13, *range(16, 24)]
    assert kept(row)[1] == [20, 21, 22, 23]


def test_an_end_that_is_written_once_is_learnt_after_each_answer() -> None:
    (row,) = encode(99, TWO_TURNS, late_end=77).rows
    assert row.ids.tolist() == [*range(11), 77]
    learnt = row.labels != IGNORED
    assert row.labels[learnt].tolist() == [3, 4, 77, 7, 8, 9, 10, 77]  # the first of the next question stands where the end is due
    (row,) = encode(99, TWO_TURNS, late_end=77, mask_history=True).rows
    assert row.labels[row.labels != IGNORED].tolist() == [7, 8, 9, 10, 77]
    assert all(len(row.ids) <= cutoff for cutoff in range(1, 13) for row in encode(cutoff, TWO_TURNS, late_end=77).rows)


def test_collate_pads_on_the_right() -> None:
    rows = [Row(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in (([5, 6, 7], [-100, 6, 7]), ([8], [-100]))]
    batch: dict[str, Any] = chat(8).collate(rows)
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["input_ids"][1, 0].item() == 8
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_positions_of_rows_that_have_their_own() -> None:
    own = Row(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.asarray([0, 1, 0, 1], np.int32))
    plain = Row(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    assert "position_ids" not in chat(8).collate([plain])
    assert chat(8).collate([own, plain])["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
