"""Chat in a terminal and in scripts: history, clear, exit, and a Ctrl-C that stops an answer and not the program."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.cli import main
from finery.commands.chat import Conversation
from finery.commands.train import train
from finery.data.sample import Message
from finery.run import Run

Keys = Callable[..., dict[str, Any]]


class Recorder:
    """An engine that answers with what it was asked, and an own template that keeps messages."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], str]] = []

    def stream(self, prompt: Any, options: Any) -> Iterator[str]:
        self.asked.append(prompt)
        yield from ("to ", f"<{prompt[0][-1].content}>")

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "") -> Any:
        return (list(messages), system)


@pytest.fixture
def talk() -> Conversation:
    recorder: Any = Recorder()
    return Conversation(recorder, recorder, Run.from_dict({"model_name_or_path": "a/b"}), "be brief")


def typed(monkeypatch: pytest.MonkeyPatch, talk: Conversation, text: str) -> list[tuple[list[Message], str]]:
    from finery.commands.chat import _terminal

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    _terminal(talk)
    engine: Any = talk.engine
    return engine.asked


def test_history_and_system(monkeypatch: pytest.MonkeyPatch, talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    asked = typed(monkeypatch, talk, "one\n\ntwo\nexit\nthree\n")
    assert [message.content for message in asked[-1][0]] == ["one", "to <one>", "two"]
    assert asked[-1][1] == "be brief"
    assert len(asked) == 2, "`exit` leaves, an empty line asks nothing"
    assert "to <one>\nto <two>\n" in capsys.readouterr().out


def test_clear_forgets(monkeypatch: pytest.MonkeyPatch, talk: Conversation) -> None:
    asked = typed(monkeypatch, talk, "one\nclear\ntwo\n")
    assert [message.content for message in asked[-1][0]] == ["two"]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(prompt: Any, options: Any) -> Iterator[str]:
        yield "half an"
        raise KeyboardInterrupt

    engine: Any = talk.engine
    engine.stream = interrupted
    talk.say("one")
    assert talk.history[-1] == Message("assistant", "half an")
    assert "half an [stopped]" in capsys.readouterr().out


def test_prompt_for_scripts(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(do_train=None, max_steps=None)
    words = [f"model_name_or_path={given['model_name_or_path']}", "do_sample=false", "max_new_tokens=4"]
    assert main(["chat", *words, "--prompt", "Who are you?", "--system", "be brief"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("\n")
    assert "as it is: no adapter was named" in told.err


def test_the_same_yaml_chats_with_what_it_trained(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(max_steps=60, learning_rate=0.05, dataset="names", placeholders={"name": "Ada", "author": "us"}, finetuning_type="full")
    given |= {"do_sample": False, "max_new_tokens": 40}
    train(Run.from_dict(given))
    capsys.readouterr()
    said = finery.chat(given, [{"role": "user", "content": "Who are you, number 3?"}])
    assert said == "I am Ada, made by us."
    assert "taking the trained model in" in capsys.readouterr().err


def test_a_chat_of_python_may_have_a_system_message(keys: Keys) -> None:
    given = keys(do_train=None, do_sample=False, max_new_tokens=3)
    plain = finery.chat(given, [{"role": "user", "content": "Hi"}])
    told = finery.chat(given, [{"role": "system", "content": "Speak of other things."}, {"role": "user", "content": "Hi"}])
    assert isinstance(plain, str)
    assert isinstance(told, str)


def test_ctrl_c_in_a_real_terminal(tiny_model: Path) -> None:
    """A long answer is stopped by one SIGINT, the program goes on and leaves at `exit`."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "finery", "chat", f"model_name_or_path={tiny_model}", "max_new_tokens=100000", "do_sample=false"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever started the tests in the background has it ignored
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=heard)
    os.close(slave)
    screen = b""

    def read_until(wanted: bytes, seconds: float = 60) -> None:
        nonlocal screen
        os.set_blocking(master, False)
        until = time.monotonic() + seconds
        while wanted not in screen and time.monotonic() < until:
            try:
                screen += os.read(master, 65536)
            except BlockingIOError:
                time.sleep(0.02)
        assert wanted in screen, screen[-2000:]

    try:
        read_until(b"you> ")
        os.write(master, b"tell me a story\n")
        read_until(b"tell me a story\r\n")
        screen = b""
        until = time.monotonic() + 60
        while not screen and time.monotonic() < until:  # on a busy machine the answer begins late
            with contextlib.suppress(BlockingIOError):
                screen += os.read(master, 65536)
            time.sleep(0.02)
        screen = b""
        process.send_signal(signal.SIGINT)
        read_until(b"[stopped]")
        read_until(b"you> ")
        os.write(master, b"exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)


TOOLS = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'


class Caller:
    """An engine that calls a tool twice at once, and then says what it was told."""

    def __init__(self, template: Any) -> None:
        self.template = template
        self.prompts: list[str] = []

    def stream(self, prompt: list[int], options: Any) -> Iterator[str]:
        assert not options.skip_special_tokens, "the marks of a dialect may be special tokens"
        self.prompts.append(self.template.tokenizer.decode(prompt))
        call = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
        yield from (
            ["Hm. ", call.format("Rome"), "\n", call.format("Oslo"), "<|im_end|>"] if len(self.prompts) == 1 else ["Oslo.", "<|im_end|>"]
        )


def test_calls_are_shown_and_their_results_asked_for(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from finery.data.template import TemplateOptions, load_template

    template = load_template(TemplateOptions(template="qwen"), AutoTokenizer.from_pretrained(str(tiny_model)))
    engine: Any = Caller(template)
    talk = Conversation(engine, template, Run.from_dict({"model_name_or_path": "a/b"}), "", TOOLS)
    talk.say("Where is it colder?")
    assert talk.owed == ["weather", "weather"]
    talk.say("3")
    assert len(engine.prompts) == 1, "another result is owed"
    talk.say("-8")
    said = capsys.readouterr().out
    assert '[calls weather with {"city": "Rome"}]\n[calls weather with {"city": "Oslo"}]\n' in said
    assert said.endswith("\nOslo.\n"), "the token that ends an answer is not shown"
    assert [message.role for message in talk.history] == ["user", "function", "observation", "observation", "assistant"]
    assert talk.history[1].before_calls == "Hm."
    assert talk.history[-1] == Message("assistant", "Oslo.")
    assert "<tool_response>\n-8\n</tool_response>" in engine.prompts[-1], "the prompt is written as in training"
    talk.say("Thanks.")
    assert talk.history[-2] == Message("user", "Thanks.")


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ('[{"nam": 1}]', "a function schema with a 'name'"), (None, "No such file")]
)
def test_tools_that_are_none(text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    assert main(["chat", "model_name_or_path=a/b", "--tools", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: '--tools': {file} should hold a JSON list of function schemas: ")
    assert told in said
