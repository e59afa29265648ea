"""Chat in a terminal and in scripts: what is said and commanded, and a Ctrl-C that stops an answer and not the program."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import finery
from conftest import build_model
from finery.cli import main
from finery.commands.train import train
from finery.run import Run

Keys = Callable[..., dict[str, Any]]


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Standard input as a script gives it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))


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


def test_ctrl_c_in_a_real_terminal(tmp_path: Path) -> None:
    """A long answer is stopped by one SIGINT, the program goes on and leaves at `exit`."""
    model = build_model(tmp_path / "model", max_position_embeddings=200_000)  # its answer is not over before the signal comes
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "finery", "chat", f"model_name_or_path={model}", "max_new_tokens=100000", "do_sample=false"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever started the tests in the background has it ignored
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=heard)
    os.close(slave)
    screen = b""

    def read_until(wanted: bytes, seconds: float = 180) -> None:
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
        until = time.monotonic() + 180
        while not screen and time.monotonic() < until:  # on a busy machine the answer begins late
            with contextlib.suppress(BlockingIOError):
                screen += os.read(master, 65536)
            time.sleep(0.02)
        screen = b""
        process.send_signal(signal.SIGINT)
        read_until(b", stopped")
        read_until(b"you> ")
        os.write(master, b"exit\n")
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)


def test_a_script_talks_and_commands(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers alone on standard output; the same words as for a person; the file goes on where it was."""
    given = [f"model_name_or_path={keys()['model_name_or_path']}", "do_sample=false", "max_new_tokens=4"]
    one, two, three = (tmp_path / f"{name}.json" for name in ("one", "two", "three"))
    lines = [
        "\ufeffHi",
        "/set max_new_tokens=2",
        f"/save {one}",
        "Hi",
        f"/load {one}",
        "Hi",
        f"/save {two}",
        "clear",
        "Hi",
        f"/save {three}",
        "exit",
        "Hi",
    ]
    piped(monkeypatch, "\n".join(lines).encode())
    assert main(["chat", *given, "--system", "be brief"]) == 0
    told = capsys.readouterr()
    assert "(2 messages are in" in told.err and "max_new_tokens=2" in told.err and "(forgotten)" in told.err
    said = [message["content"] for file in (one, two, three) for message in json.loads(file.read_text())["messages"]]
    first, again, last = said[2], said[7], said[-1]
    assert said == ["be brief", "Hi", first, "be brief", "Hi", first, "Hi", again, "be brief", "Hi", last]
    assert first.startswith(last) and last != first, "a shorter answer to the same"
    assert told.out == f"{first}\n{again}\n{again}\n{last}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"Hi\nh\xe9llo\n", "standard input, line 2: should be UTF-8, found the byte 0xe9 after 1 others"),
        (b"/load nowhere.json\nHi\n", "nowhere.json cannot be read: No such file"),
        (b"/sett 1\n", "there is no /sett; did you mean '/set'?; /help lists"),
        (b"/set temperature=-1\n", "'temperature' should be at least 0, found -1"),
        (b"fox " * 600, "the prompt has "),
    ],
)
def test_a_script_ends_with_its_mistake(
    keys: Keys, text: bytes, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, text)
    assert main(["chat", f"model_name_or_path={keys()['model_name_or_path']}", "max_new_tokens=2"]) == 2
    assert f"error: {told}" in capsys.readouterr().err


def test_ctrl_c_ends_a_script_without_a_traceback(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "finery", "chat", f"model_name_or_path={tiny_model}", "max_new_tokens=100000", "do_sample=false"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heard
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        said = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert (said + out).endswith(b"\n")  # after [stopped], unless the answer was there already
    assert b"Traceback" not in err


def test_one_process_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["chat", "model_name_or_path=a/b"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_a_system_text_of_bytes(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", f"model_name_or_path={tiny_model}", "--system", "h\udce9"]) == 2
    assert "error: '--system': that holds bytes which are not UTF-8" in capsys.readouterr().err


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
