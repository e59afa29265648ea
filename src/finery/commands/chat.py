"""Talk to a model in the terminal: base, with adapters, or merged."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from finery.compat import garbage_collected, num_ranks
from finery.data.sample import Message, Role
from finery.data.template import Template
from finery.engines.base import Engine
from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

if TYPE_CHECKING:
    from finery.talks.talk import Talk

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery chat RUN.yaml [--system TEXT] [--tools FILE] [--prompt TEXT ...] [key=value | --key value] ..."
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--tools", type=Path, help="a JSON file of function schemas; of a call, what you say next is the result")
    parser.add_argument("--prompt", action="append", help="a question for scripts: answer it and leave; several make a conversation")


def run(args: Namespace, words: list[str]) -> int:
    """Answer the prompts, or talk until `exit`."""
    from finery.talks.speaker import Speaker
    from finery.talks.terminal import has_person, listen, screen_for
    from finery.talks.words import Desk

    if num_ranks() > 1:
        raise UserError("`finery chat` talks from one process: start it without torchrun")
    chosen = Run.read(words)
    talk = _talk(args.system, args.tools)
    engine, template = open_engine(chosen)
    try:
        speaker = Speaker(engine, template, chosen)
        person = has_person() and not args.prompt
        desk = Desk(speaker, screen_for(person), talk, speaker.options)
        if talk.tools and speaker.dialect is None:
            log.warning("%s calls tools in no way that Finery reads: answers are shown as they are written", template.told)
        for prompt in args.prompt or []:
            desk.say(prompt)
        if not args.prompt:
            listen(desk, person)
    finally:
        engine.close()
    return 0


def _talk(system: str, tools: Path | None) -> Talk:
    """A talk that begins with what the command line says."""
    from finery.talks.talk import Talk
    from finery.talks.words import offer_file

    talk = Talk()
    word = "--system"
    try:
        talk.tell(system)
        word = "--tools"
        if tools is not None:
            offer_file(talk, tools)
    except UserError as error:
        raise UserError(f"{word!r}: {error}") from None
    return talk


def open_engine(run: Run) -> tuple[Engine, Template]:
    """The trained model of a run, or its base model, ready to answer."""
    from finery.engines.base import Source
    from finery.models.load import locate_served
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
    source = Source(found, run.adapter, run.model, run.quantizing, tokenizer, template.stop_ids, locate_served(run.model), run.engines)
    return run.engine.open(source, run.engine_options), template


@garbage_collected()
def answer(run: Run, messages: Iterable[dict[str, str]]) -> str:
    """One answer to a conversation of `{"role": …, "content": …}` dicts."""
    history = [_message(message) for message in messages]
    system = history.pop(0).content if history and history[0].role == "system" else ""
    if not history or history[-1].role not in ("user", "observation") or any(message.role == "system" for message in history):
        raise UserError("messages should end with a user's (or a tool's), and a system message may only come first")
    engine, template = open_engine(run)
    with closing(engine):
        return engine.generate(template.prompt_ids(history, system), run.generation)


def _message(message: dict[str, str]) -> Message:
    roles = {"tool": "observation"} | {role: role for role in get_args(Role)}
    role, content = message.get("role"), message.get("content")
    if role not in roles or not isinstance(content, str):
        raise UserError(f"a message should have a 'role' ({', '.join(roles)}) and a text as 'content', found {message!r}")
    return Message(roles[role], content)  # type: ignore[arg-type]
