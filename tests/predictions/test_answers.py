"""Many questions at once: in order, bounded, and what there is stays when it breaks."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.commands import chat
from finery.engines.base import Ask, Engine, GenerationOptions, Piece, Stream, Token
from finery.predictions.answers import IN_FLIGHT, answered
from finery.predictions.questions import Question

OPTIONS = GenerationOptions.model_validate({})


class Backwards(Engine):
    """Answers the newest question first, `patience` at a time; breaks before it answers question `breaks_at`."""

    @property
    def longest(self) -> int:
        return 1000

    def __init__(self, patience: int, total: int, breaks_at: int | None = None) -> None:
        self.patience, self.total, self.breaks_at = patience, total, breaks_at
        self.asked: list[tuple[Ask, Stream]] = []
        self.num_asked, self.most, self.closed = 0, 0, False

    def begin(self, ask: Ask) -> Stream:
        self.asked.append((ask, stream := Stream()))
        self.num_asked += 1
        self.most = max(self.most, len(self.asked))
        if len(self.asked) == self.patience or self.num_asked == self.total:
            ready, self.asked = self.asked, []
            threading.Thread(target=self.answer, args=(ready,)).start()
        return stream

    def answer(self, asked: list[tuple[Ask, Stream]]) -> None:
        for ask, stream in reversed(asked):
            (number,) = ask.prompt_ids
            if number == self.breaks_at:
                stream.put(RuntimeError("out of breath"))
                continue
            stream.put(Piece(f"answer {number}", [Token(1)]))
            stream.put(Piece("!", [Token(2)], "stop"))

    def embed(self, prompts: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def ask(question: Question) -> Ask:
    return Ask(question.prompt_ids, OPTIONS)


def questions(count: int) -> list[Question]:
    return [Question(number, [number], "") for number in range(count)]


def test_in_order_and_never_too_many() -> None:
    engine = Backwards(IN_FLIGHT, 200)
    found = list(answered(engine, questions(200), ask))
    assert [answer.text for answer in found] == [f"answer {number}!" for number in range(200)]
    assert {answer.num_tokens for answer in found} == {2}
    assert engine.most == IN_FLIGHT


def test_a_late_answer_keeps_nobody_from_being_asked() -> None:
    class Late(Backwards):
        first: Stream

        def begin(self, ask: Ask) -> Stream:
            if ask.prompt_ids == [0]:
                self.first = Stream()
                return self.first
            stream = super().begin(ask)
            if ask.prompt_ids == [199]:
                self.first.put(Piece("late", [Token(1)], "stop"))
            return stream

    found = list(answered(Late(1, 200), questions(200), ask))
    assert [answer.text for answer in found] == ["late", *(f"answer {number}!" for number in range(1, 200))]


def test_a_failure_is_raised_in_its_place_and_the_rest_is_ended() -> None:
    engine = Backwards(10, 30, breaks_at=12)
    answers = answered(engine, questions(30), ask)
    told = []
    with pytest.raises(RuntimeError, match="out of breath"):
        told += [told.append(answer.text) for answer in answers]
    assert [text for text in told if text] == [f"answer {number}!" for number in range(12)]


def test_leaving_ends_what_is_on_its_way() -> None:
    class Silent(Backwards):
        streams: list[Stream] = []

        def begin(self, ask: Ask) -> Stream:
            if ask.prompt_ids == [0]:
                return super().begin(ask)
            self.streams.append(Stream())
            return self.streams[-1]

    answers: Any = answered(engine := Silent(1, 9), questions(9), ask)
    next(answers)
    answers.close()
    assert all(stream.cancelled for stream in engine.streams)


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_what_was_answered_stays(how: type, keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = chat.open_engine

    class Torn(Backwards):
        numbers: Iterator[int] = iter(range(100))

        def begin(self, ask: Ask) -> Stream:
            stream = Stream()
            number = next(self.numbers)
            stream.put(how("enough") if number == 5 else Piece(f"第{number}个", [Token(1)], "stop"))
            return stream

    engine = Torn(1, 24)
    monkeypatch.setattr(chat, "open_engine", lambda run: (engine, opened(run)[1]))
    asked = {"do_train": False, "dataset": None, "eval_dataset": "sums", "do_predict": True, "predict_with_generate": True}
    given = keys(**asked, predict_metric="json:loads")
    with pytest.raises(how, match="enough"):
        finery.train(given)
    path = Path(given["output_dir"]) / "generated_predictions.jsonl"
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line)["predict"] for line in text.splitlines()] == [f"第{number}个" for number in range(5)]
    assert "第0个" in text, "not escaped"
    assert engine.closed and not (path.parent / "predict_results.json").exists()
