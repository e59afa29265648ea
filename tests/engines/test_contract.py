"""What every engine promises, tried with each: answers that do not depend on their neighbours, and plain words where it cannot."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engines.opening import CAN, KINDS, half_model, open_engine, opened, ready
from finery.engines.base import Ask, Engine, GenerationOptions, Piece
from finery.errors import UserError
from finery.models.load import load_model

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def options(**changes: Any) -> GenerationOptions:
    return GenerationOptions.model_validate(GREEDY | changes)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_model(tmp_path_factory.mktemp("half") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_model))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(kind: str, tiny_model: Path) -> Iterator[Engine]:
    with opened(kind, tiny_model) as built:
        yield built


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Engine]:
    """What all are measured by."""
    with opened("huggingface", tiny_model) as built:
        yield built


@pytest.fixture
def ask(tokenizer: Any) -> Callable[..., Ask]:
    def build(text: str = "Who are you?", *, fields: dict[str, Any] | None = None, **changes: Any) -> Ask:
        return Ask(tokenizer(text)["input_ids"], options(**changes), **(fields or {}))

    return build


def needs(kind: str, what: str) -> None:
    if what not in CAN[kind]:
        pytest.skip(f"{kind} refuses it")


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


PROMPTS = ["Who are you?", "fox", "The quick brown fox jumps over the lazy dog. " * 4, "你是谁？", "I", "0123456789 " * 9, "dog?", "a b c"]


def test_answers_in_a_batch_are_those_of_each_alone(engine: Engine, ask: Callable[..., Ask]) -> None:
    """Prompts of all lengths, more of them than rows at first, answers of all lengths: rows join and leave all the time."""
    asks = [ask(text, max_new_tokens=3 + 5 * number) for number, text in enumerate(PROMPTS)]
    alone = [list(engine.begin(one)) for one in asks]
    streams = [engine.begin(one) for one in asks]
    together = [list(stream) for stream in streams]
    assert [ids_of(pieces) for pieces in together] == [ids_of(pieces) for pieces in alone]
    assert [text_of(pieces) for pieces in together] == [text_of(pieces) for pieces in alone]
    assert [len(ids_of(pieces)) for pieces in together] == [3 + 5 * number for number in range(len(PROMPTS))]
    assert all(pieces[-1].finish == "length" for pieces in together)


def test_greedy_answers_are_those_of_the_model_itself(engine: Engine, plain: Engine, ask: Callable[..., Ask]) -> None:
    for text in PROMPTS:
        assert ids_of(list(engine.begin(ask(text)))) == ids_of(list(plain.begin(ask(text))))


def test_one_that_begins_later_may_end_earlier(engine: Engine, ask: Callable[..., Ask]) -> None:
    """Tokens of all come in turn."""
    order: list[str] = []
    ended = threading.Event()

    def note(name: str, wait: int) -> Callable[[Any], None]:
        def listener(piece: Any) -> None:
            order.append(name)
            if piece.finish:
                order.append(f"{name} ends")
            if len([one for one in order if "ends" in one]) == wait:
                ended.set()

        return listener

    engine.begin(ask("Who are you?", max_new_tokens=60)).listen(note("long", 2))
    engine.begin(ask("fox", max_new_tokens=3)).listen(note("short", 2))
    assert ended.wait(60)
    assert order.index("short ends") < order.index("long ends")
    assert order.index("short") < order.index("long ends")


def test_a_stop_text_ends_an_answer_before_it(engine: Engine, ask: Callable[..., Ask]) -> None:
    whole = text_of(list(engine.begin(ask(max_new_tokens=30))))
    stop = whole[9:12]
    pieces = list(engine.begin(ask(max_new_tokens=30, fields={"stop": ("never comes", stop)})))
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    pieces = list(engine.begin(ask(max_new_tokens=30, fields={"stop": (whole[-1:] + "and more",)})))
    assert text_of(pieces) == whole, "what was held back comes at the end"


def test_a_seed_makes_the_same_answer_whatever_else_is_asked(engine: Engine, ask: Callable[..., Ask]) -> None:
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    alone = ids_of(list(engine.begin(ask(**drawn, fields={"seed": 5}))))
    streams = [engine.begin(ask(text, **drawn, fields={"seed": seed})) for text, seed in (("fox", 1), ("Who are you?", 5), ("I", None))]
    assert ids_of([list(stream) for stream in streams][1]) == alone
    others = {tuple(ids_of(list(engine.begin(ask(**drawn, fields={"seed": seed}))))) for seed in range(4)}
    assert len(others) == 4
    assert len({tuple(ids_of(list(engine.begin(ask(**drawn))))) for _ in range(3)}) == 3


def test_what_is_too_unlikely_is_not_drawn(engine: Engine, ask: Callable[..., Ask]) -> None:
    """Each way of narrowing the choice down to one gives the greedy answer."""
    greedy = ids_of(list(engine.begin(ask())))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"min_p": 1.0, "top_k": 0, "top_p": 1.0}, {"temperature": 0.0}):
        assert ids_of(list(engine.begin(ask(do_sample=True, **narrow)))) == greedy, narrow


def test_penalties_mean_what_they_say(kind: str, engine: Engine, plain: Engine, ask: Callable[..., Ask]) -> None:
    """A presence penalty counts a token once, a frequency penalty every time, a repetition penalty the prompt's, too."""
    usual = ids_of(list(engine.begin(ask(max_new_tokens=40))))
    assert len(set(usual)) < len(usual), "the tiny model repeats itself"
    strengths: list[dict[str, Any]] = [{"repetition_penalty": 2.0}]
    if "penalty" in CAN[kind]:
        strengths += [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 0.01}]
    for strong in strengths:
        ids = ids_of(list(engine.begin(ask(max_new_tokens=40, **strong))))
        assert ids[:12] == ids_of(list(plain.begin(ask(**strong)))), strong
        assert len(set(ids)) > len(set(usual)) or strong == {"frequency_penalty": 0.01}, strong
    for name in ("presence_penalty", "frequency_penalty") if "penalty" not in CAN[kind] else ():
        with pytest.raises(UserError, match="as OpenAI means it"):
            engine.begin(ask(**{name: -1.0}))


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_are_the_models_own(count: int, kind: str, engine: Engine, ask: Callable[..., Ask], tiny_model: Path) -> None:
    """Before temperature and penalties; the likeliest first."""
    needs(kind, "likeliest" if count else "logprob")
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 20} if kind != "llamacpp" else {}
    one = ask(max_new_tokens=4, repetition_penalty=1.5, **drawn, fields={"num_logprobs": count, "seed": 3})
    tokens = [token for piece in engine.begin(one) for token in piece.tokens]
    model = load_model(tiny_model, torch.float32, False).eval()
    ids = torch.tensor([[*one.prompt_ids, *(token.id for token in tokens)]])
    with torch.no_grad():
        wanted = torch.log_softmax(model(ids).logits[0], -1)[len(one.prompt_ids) - 1 : -1]
    close = 5e-3 if kind == "llamacpp" else 1e-4  # what is multiplied with weights of f16 is rounded to f16
    for place, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float(wanted[place, token.id]), abs=close)
        assert len(token.likeliest) == count
        values, best = wanted[place].topk(3)
        if count and values.diff().abs().min() > close:
            assert [id for id, _ in token.likeliest] == best.tolist()
        if count:
            assert [value for _, value in token.likeliest] == pytest.approx(values.tolist(), abs=close)
    assert all(token.logprob is None for piece in engine.begin(ask()) for token in piece.tokens)


class Only:
    """Lets only multiples of a number come."""

    def __init__(self, factor: int, size: int) -> None:
        self.ids = np.arange(0, size, factor)
        self.taken: list[int] = []

    def allowed(self) -> Any:
        return self.ids

    def take(self, token: int) -> None:
        self.taken.append(token)


def test_a_constraint_is_kept_and_told(kind: str, engine: Engine, ask: Callable[..., Ask], tokenizer: Any) -> None:
    """Beside answers that have none."""
    needs(kind, "form")
    only = Only(7, len(tokenizer))
    streams = [engine.begin(ask()), engine.begin(ask(fields={"constraint": only}))]
    free, bound = (ids_of(list(stream)) for stream in streams)
    assert all(id % 7 == 0 for id in bound) and bound == only.taken
    assert free == ids_of(list(engine.begin(ask())))


def test_what_an_engine_cannot_do_is_refused(kind: str, engine: Engine, ask: Callable[..., Ask], tokenizer: Any) -> None:
    """In words for who asked, before anything is generated."""
    wishes = {"form": {"constraint": Only(7, len(tokenizer))}, "likeliest": {"num_logprobs": 2}, "logprob": {"num_logprobs": 0}}
    for what, fields in wishes.items():
        if what not in CAN[kind]:
            with pytest.raises(UserError, match=f"'infer_backend: {kind}' cannot .*'infer_backend: huggingface' does"):
                engine.begin(ask(fields=fields))
    if "embed" not in CAN[kind]:
        with pytest.raises(UserError, match=f"'infer_backend: {kind}' cannot make embeddings"):
            engine.embed([[5, 6]])
    if kind != "huggingface":
        with pytest.raises(UserError, match="there is no adapter 'poet'"):
            engine.begin(ask(fields={"adapter": "poet"}))


def test_an_answer_can_be_left(engine: Engine, ask: Callable[..., Ask]) -> None:
    """Others go on, and its row is free again."""
    endless, other = engine.begin(ask(max_new_tokens=100_000)), engine.begin(ask("fox", max_new_tokens=40))
    next(endless)
    endless.close()
    assert len(ids_of(list(other))) == 40
    assert list(endless) == []
    assert ids_of(list(engine.begin(ask()))) == ids_of(list(engine.begin(ask())))


def test_what_cannot_be_answered_is_told(engine: Engine, ask: Callable[..., Ask], tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the prompt has no token"):
        engine.begin(Ask([], options()))
    with pytest.raises(UserError, match=r"the prompt has [\d,]+ tokens, and the model takes 512 with its answer"):
        engine.begin(ask("fox " * 600))
    almost = Ask([5] * 505, options(max_new_tokens=100))
    pieces = list(engine.begin(almost))
    assert len(ids_of(pieces)) == 7 and pieces[-1].finish == "length", "the answer ends where positions do"


@pytest.mark.parametrize("kind", ["huggingface", "openvino", "llamacpp"])
def test_a_long_prompt_does_not_hold_up_the_others(kind: str, tiny_model: Path, ask: Callable[..., Ask]) -> None:
    """It is read in parts, and what comes out is the same."""
    found = []
    for chunk in (512, 16):
        with opened(kind, tiny_model, prefill_chunk=chunk) as built:
            streams = [built.begin(ask("fox", max_new_tokens=30)), built.begin(ask("The quick brown fox. " * 12))]
            found.append([ids_of(list(stream)) for stream in streams])
    assert found[0] == found[1]


def test_more_answers_than_there_are_rows_wait(kind: str, tiny_model: Path, ask: Callable[..., Ask]) -> None:
    if kind in ("vllm", "sglang"):
        pytest.skip("the library decides")
    with opened(kind, tiny_model, max_batch_size=2) as built:
        streams = [built.begin(ask(text, max_new_tokens=5)) for text in PROMPTS]
        assert [len(ids_of(list(stream))) for stream in streams] == [5] * len(PROMPTS)


def test_stop_tokens_end_an_answer_and_are_not_told(kind: str, engine: Engine, tiny_model: Path, ask: Callable[..., Ask]) -> None:
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "fields": {"seed": 5}}
    whole = ids_of(list(engine.begin(ask(max_new_tokens=40, **drawn))))
    stop = whole[5]
    assert stop not in whole[:5]
    with opened(kind, tiny_model, stop_ids=frozenset({stop})) as built:
        pieces = list(built.begin(ask(max_new_tokens=40, **drawn)))
        assert ids_of(pieces) == whole[:5] and pieces[-1].finish == "stop"
        assert len(ids_of(list(built.begin(ask(max_new_tokens=5, **drawn))))) == 5


def test_embeddings_are_means_of_hidden_states(kind: str, engine: Engine, tiny_model: Path) -> None:
    needs(kind, "embed")
    model = load_model(tiny_model, torch.float32, False).eval()
    ids = [[5, 6, 7], [9, 10]]
    wanted = [model.get_decoder()(input_ids=torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
    assert np.allclose(engine.embed(ids), torch.stack(wanted).detach().numpy(), atol=5e-3 if kind == "llamacpp" else 1e-5)


class Broken(Only):
    def allowed(self) -> Any:
        raise RuntimeError("a grammar broke")


def test_an_error_is_the_answers_own_and_the_engine_lives(kind: str, engine: Engine, ask: Callable[..., Ask]) -> None:
    needs(kind, "form")
    stream, other = engine.begin(ask(max_new_tokens=400)), engine.begin(ask(fields={"constraint": Broken(1, 1)}))
    with pytest.raises(RuntimeError, match="a grammar broke"):
        list(other)
    assert len(ids_of(list(stream))) == 400, "the fault is that answer's alone"
    assert len(ids_of(list(engine.begin(ask())))) == 12


@pytest.mark.parametrize("kind", ["openvino", "llamacpp", "vllm", "sglang"])
def test_an_error_of_the_library_reaches_all_that_wait(kind: str, tiny_model: Path, ask: Callable[..., Ask]) -> None:
    with opened(kind, tiny_model) as built, pytest.MonkeyPatch.context() as patch:
        stream = built.begin(ask(max_new_tokens=400))
        next(stream)
        fail(built, patch)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            list(stream)
        patch.undo()
        if kind == "sglang" or kind == "vllm":
            built.engine.fails = None  # type: ignore[attr-defined]
        assert len(ids_of(list(built.begin(ask())))) == 12


class Failing:
    """What is left of a pipeline."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def step(self) -> None:
        raise RuntimeError("the machine is gone")


def fail(engine: Any, patch: pytest.MonkeyPatch) -> None:
    """From now on whatever the library does goes wrong."""

    def decode(parts: Any) -> None:
        raise RuntimeError("the machine is gone")

    if hasattr(engine, "pipeline"):
        patch.setattr(engine, "pipeline", Failing(engine.pipeline))
    elif hasattr(engine, "context"):
        patch.setattr(engine.context, "decode", decode)
    else:
        engine.engine.fails = "the machine is gone"


def test_a_closed_engine_tells(kind: str, tiny_model: Path, ask: Callable[..., Ask]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ready(kind, patch)
        built = open_engine(kind, tiny_model)
        stream, other = built.begin(ask(max_new_tokens=100_000)), built.begin(ask(max_new_tokens=100_000))
        next(stream)
        built.close()
        for one in (stream, other):
            with pytest.raises(UserError, match="the engine was closed"):
                list(one)
        with pytest.raises(UserError, match="the engine is closed"):
            built.begin(ask())
        built.close()


@pytest.mark.parametrize("text", ["The quick 你是谁？ brown 🦊 fox", "é" * 5, " leading", "a\n\nb", "🦊🦊"])
def test_pieces_are_whole_characters(text: str, tokenizer: Any) -> None:
    from finery.engines.functions.writing import Writer

    writer = Writer(tokenizer)
    pieces = [writer.add(id) for id in tokenizer(text)["input_ids"]]
    assert "".join([*pieces, writer.end()]) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stops", [["fox"], ["brown fox", "own"], ["x jumps"], ["nothing"], ["quick", "The quick"]])
def test_stop_texts_across_tokens(stops: list[str], tokenizer: Any) -> None:
    from finery.engines.functions.writing import Writer

    text = "The quick brown fox jumps over the fox."
    writer = Writer(tokenizer, stops=stops)
    told = ""
    for id in tokenizer(text)["input_ids"]:
        told += writer.add(id)
        if writer.stopped:
            break
    told += writer.end()
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    first = min(found)[2] if found else None
    assert told == (text[: text.find(first)] if first else text), "the one that is complete first counts"
    assert writer.stopped == bool(first)
