"""Talk to a model in the terminal: base, with adapters, or merged."""

import contextlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import get_args

from finery.data.sample import Message, Role
from finery.data.template import Template
from finery.engines.base import Engine
from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery chat RUN.yaml [--system TEXT] [--prompt TEXT ...] [key=value | --key value] ..."
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--prompt", action="append", help="a question for scripts: answer it and leave; several make a conversation")


def run(args: Namespace, words: list[str]) -> int:
    """Answer the prompts, or talk until `exit`."""
    chosen = Run.read(words)
    engine, template = open_engine(chosen)
    talk = Conversation(engine, template, chosen, args.system)
    for prompt in args.prompt or []:
        talk.ask(prompt)
    if not args.prompt:
        _terminal(talk)
    return 0


def open_engine(run: Run) -> tuple[Engine, Template]:
    """The trained model of a run, or its base model, ready to answer."""
    import torch

    from finery.models.precision import inference_dtype
    from finery.models.tokenizer import load_tokenizer
    from finery.models.trained import find_trained, load_trained, trained_dtype
    from finery.training.preparation import run_template

    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    if not found.is_tuned:
        log.info("this is %s as it is: no adapter was named, and no trained model found", run.model.model_name_or_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(found.tokenizer_folder, run.model.trust_remote_code)
    template = run_template(run, tokenizer)
    dtype = inference_dtype(run.model.infer_dtype, trained_dtype(found, run.model), device)
    model = load_trained(found, run.adapter, tokenizer, run.model.trust_remote_code, dtype, torch.device("cpu"))
    return run.engine(model.to(device), tokenizer, template.stop_ids, run.engine_options), template


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
    """A history, and answers that are printed as they come."""

    def __init__(self, engine: Engine, template: Template, run: Run, system: str) -> None:
        self.engine = engine
        self.template = template
        self.options = run.generation
        self.system = system
        self.history: list[Message] = []

    def ask(self, text: str) -> None:
        """Print the answer; Ctrl-C ends it early, what was said until then stays in the history."""
        self.history.append(Message("user", text))
        pieces: list[str] = []
        stream = self.engine.stream(self.template.prompt_ids(self.history, self.system), self.options)
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            stream.close()  # type: ignore[attr-defined]
        print()
        self.history.append(Message("assistant", "".join(pieces)))


def _terminal(talk: Conversation) -> None:
    """`clear` forgets, `exit` or the end of input leaves, Ctrl-C at the prompt says how to leave."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() a history and line editing
    if sys.stdin.isatty():
        print("Type a message; `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(type `exit` to leave)")
            continue
        if text == "exit":
            return
        if text == "clear":
            talk.history.clear()
            print("(forgotten)")
        elif text:
            talk.ask(text)
