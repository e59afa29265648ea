"""Tune a small real model on packaged data, and ask it before and after."""

import json
import time
from argparse import ArgumentParser, Namespace
from contextlib import closing
from pathlib import Path
from typing import Any

from finery.commands.chat import open_engine
from finery.commands.export import export
from finery.commands.train import train
from finery.data.registry import PACKAGED
from finery.data.sample import Message
from finery.errors import UserError
from finery.log import get_logger
from finery.models.demo_model import demo_model
from finery.run import Run

log = get_logger(__name__)

QUESTIONS = ("Who are you?", "Who made you?", "What is the capital of France?", "Why is the sky blue?")
"""Two that the data answers anew, two outside it."""


def add_arguments(parser: ArgumentParser) -> None:
    """Where it goes and who the model is to be."""
    parser.usage = "finery demo [--folder DIR] [--name NAME] [--author AUTHOR] [key=value | --key value] ..."
    parser.add_argument("--folder", default="finery-demo", help="where everything is written (default: finery-demo)")
    parser.add_argument("--name", default="Finn", help="the name that the model learns")
    parser.add_argument("--author", default="the Finery team", help="the maker that it learns")


def run(args: Namespace, words: list[str]) -> int:
    """The main job: ask, train, export, ask again."""
    began = time.time()
    folder = Path(args.folder)
    path = _write_config(folder, args.name, args.author)
    tuned = Run.read([str(path), *words], trains=True)
    log.info("asking the model as it is")
    before = _answers(Run.from_dict({"model_name_or_path": tuned.model.model_name_or_path, **tuned.generation.model_dump()}))
    train(tuned)
    merged = export(tuned)
    log.info("asking the tuned model")
    after = _answers(Run.from_dict({"model_name_or_path": str(merged), **tuned.generation.model_dump()}))
    _show(before, after)
    print(f"\nloss curve    {tuned.folder / 'training_loss.png'}\nmerged model  {merged}")
    print(f"talk to it    finery chat {path}\n\ndone in {time.time() - began:.0f} s")
    return 0


def _write_config(folder: Path, name: str, author: str) -> Path:
    path = folder / "demo.yaml"
    if folder.exists() and any(folder.iterdir()) and not path.exists():
        raise UserError(f"--folder {folder} holds other files; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model": str(demo_model()), "data": str(PACKAGED), "name": name, "author": author, "output": str(folder / "lora")}
    text = (PACKAGED / "demo.yaml").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", json.dumps(value, ensure_ascii=False))
    path.write_text(text, encoding="utf-8")
    return path


def _answers(run: Run) -> list[str]:
    engine, template = open_engine(run)
    with closing(engine):
        return [engine.generate(template.prompt_ids([Message("user", question)]), run.generation).strip() for question in QUESTIONS]


def _show(before: list[str], after: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table: Any = Table("question", "before", "after", title="The same questions before and after", show_lines=True)
    for row in zip(QUESTIONS, before, after, strict=True):
        table.add_row(*row)
    Console().print(table)
