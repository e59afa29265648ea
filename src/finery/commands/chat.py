"""Talk to a model in the terminal: base, with adapters, or merged."""

import contextlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from finery.data.answers import dialect_of, read_answer
from finery.data.dialects.base import read_calls, read_tools
from finery.data.sample import BadRecord, Message, Role
from finery.data.template import Template
from finery.engines.base import Engine
from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery chat RUN.yaml [--system TEXT] [--tools FILE] [--prompt TEXT ...] [key=value | --key value] ..."
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--tools", type=Path, help="a JSON file of function schemas; of a call, what you say next is the result")
    parser.add_argument("--prompt", action="append", help="a question for scripts: answer it and leave; several make a conversation")


def run(args: Namespace, words: list[str]) -> int:
    """Answer the prompts, or talk until `exit`."""
    chosen = Run.read(words)
    tools = _tools(args.tools) if args.tools else ""
    engine, template = open_engine(chosen)
    talk = Conversation(engine, template, chosen, args.system, tools)
    for prompt in args.prompt or []:
        talk.say(prompt)
    if not args.prompt:
        _terminal(talk)
    return 0


def _tools(path: Path) -> str:
    """The function schemas of a file, as JSON text."""
    try:
        text = path.read_text(encoding="utf-8")
        read_tools(text)
    except (OSError, UnicodeDecodeError, BadRecord) as error:
        raise UserError(f"'--tools': {path} should hold a JSON list of function schemas: {error}") from None
    return text


def open_engine(run: Run) -> tuple[Engine, Template]:
    """The trained model of a run, or its base model, ready to answer."""
    from finery.engines.base import Source
    from finery.models.quantized import leave_out_others
    from finery.models.tokenizer import load_tokenizer
    from finery.models.trained import find_trained
    from finery.training.preparation import run_template

    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    if not found.is_tuned:
        log.info("this is %s as it is: no adapter was named, and no trained model found", run.model.model_name_or_path)
    leave_out_others(found.base, run.quantizing)
    tokenizer = load_tokenizer(found.tokenizer_folder, run.model.trust_remote_code)
    template = run_template(run, tokenizer)
    source = Source(found, run.adapter, run.model, run.quantizing, tokenizer, template.stop_ids)
    return run.engine.open(source, run.engine_options), template


def answer(run: Run, messages: Iterable[dict[str, str]]) -> str:
    """One answer to a conversation of `{"role": …, "content": …}` dicts."""
    history = [_message(message) for message in messages]
    system = history.pop(0).content if history and history[0].role == "system" else ""
    if not history or history[-1].role not in ("user", "observation") or any(message.role == "system" for message in history):
        raise UserError("messages should end with a user's (or a tool's), and a system message may only come first")
    engine, template = open_engine(run)
    return engine.generate(template.prompt_ids(history, system), run.generation)


def _message(message: dict[str, str]) -> Message:
    roles = {"tool": "observation"} | {role: role for role in get_args(Role)}
    role, content = message.get("role"), message.get("content")
    if role not in roles or not isinstance(content, str):
        raise UserError(f"a message should have a 'role' ({', '.join(roles)}) and a text as 'content', found {message!r}")
    return Message(roles[role], content)  # type: ignore[arg-type]


class Conversation:
    """A history, and answers that are printed as they come. Where a model calls tools, the user says what they give."""

    def __init__(self, engine: Engine, template: Template, run: Run, system: str, tools: str = "") -> None:
        self.engine = engine
        self.template = template
        self.system = system
        self.tools = tools
        self.dialect = dialect_of(template) if tools else None
        marks = {"skip_special_tokens": False} if self.dialect is not None else {}  # which may be special tokens
        self.options = run.generation.model_copy(update=marks)
        if tools and self.dialect is None:
            log.warning("%s calls tools in no way that Finery reads: answers are shown as they are written", template.told)
        self.ends = [str(word) for word in template.tokenizer.convert_ids_to_tokens(sorted(template.stop_ids))] if marks else []
        self.history: list[Message] = []
        self.owed: list[str] = []  # the calls whose results are to come

    def say(self, text: str) -> None:
        """The result of a call, if one is owed, else a question; it is answered once no result is owed any more."""
        if not self.owed:
            self.ask(Message("user", text))
            return
        self.owed.pop(0)
        result = Message("observation", text)
        if self.owed:
            self.history.append(result)
        else:
            self.ask(result)

    def forget(self) -> None:
        """Begin anew."""
        self.history.clear()
        self.owed.clear()

    def ask(self, message: Message) -> None:
        """Print the answer; Ctrl-C ends it early, what was said until then stays in the history."""
        self.history.append(message)
        pieces: list[str] = []
        stream = self.engine.stream(self.template.prompt_ids(self.history, self.system, self.tools), self.options)
        try:
            for piece in stream:
                pieces.append(piece)
                print(_without(piece, self.ends), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            stream.close()  # type: ignore[attr-defined]
        print()
        answer = "".join(pieces)
        self.history.append(read_answer(self.template, self.dialect, answer, self.tools) if self.tools else Message("assistant", answer))
        if self.history[-1].role == "function":
            for call in read_calls(self.history[-1].content):
                print(f"[calls {call.name} with {json.dumps(call.arguments, ensure_ascii=False)}]")
                self.owed.append(call.name)


def _without(text: str, words: Iterable[str]) -> str:
    """A text without the words of tokens at which answers end."""
    for word in words:
        text = text.replace(word, "")
    return text


def _terminal(talk: Conversation) -> None:
    """`clear` forgets, `exit` or the end of input leaves, Ctrl-C at the prompt says how to leave."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() a history and line editing
    if sys.stdin.isatty():
        print("Type a message; `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.")
    while True:
        try:
            text = input(f"{talk.owed[0] if talk.owed else 'you'}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(type `exit` to leave)")
            continue
        if text == "exit":
            return
        if text == "clear":
            talk.forget()
            print("(forgotten)")
        elif text:
            talk.say(text)
