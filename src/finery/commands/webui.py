"""The board: tune, try and export models in the browser; what is started goes on when the page or its server is gone."""

import os
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.commands.chat import open_engine
from finery.compat import give_back_memory, is_on, need, num_ranks
from finery.errors import UserError
from finery.files import cache_folder

if TYPE_CHECKING:
    from finery.web.roots import Roots


def add_arguments(parser: ArgumentParser) -> None:
    """Where it is and what it may touch."""
    parser.usage = "finery webui [--host HOST] [--port PORT] [--auth USER:PASSWORD] [--root DIR ...] [--demo]"
    parser.add_argument("--host", help="the address to listen on (GRADIO_SERVER_NAME, else 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="the port (GRADIO_SERVER_PORT, else the first free one from 7860 on)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for them; without, others need the token that is printed")
    parser.add_argument(
        "--root",
        action="append",
        default=[],
        type=Path,
        help="another folder that the page may use, beside this one and the caches; repeat it",
    )
    parser.add_argument("--demo", action="store_true", help="for public places (or DEMO_MODE=1): nothing is trained, written or exported")


def run(args: Namespace, words: list[str]) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asked for when gradio is imported
    need("gradio", "it draws the page")
    if words:
        raise UserError(f"there is no {words[0]!r} here; finery webui --help tells what there is")
    if num_ranks() > 1:
        raise UserError("`finery webui` serves from one process: start it without torchrun")
    from finery.web.server import place_for

    give_back_memory()
    place = place_for(args.host, args.port, args.auth)
    try:
        from finery.web.app import LOOK, build
        from finery.web.board import Board
        from finery.web.loaded import Loaded
        from finery.web.server import board_of, serve
        from finery.web.uploads import uploads_folder

        is_demo = args.demo or is_on("DEMO_MODE")
        board = Board(roots_of(args.root), is_demo=is_demo, demo_keys=_demo_keys() if is_demo else {}, loaded=Loaded(open_engine))

        def draw(language: str) -> Any:
            return build(replace(board, language=language, parts={}))

        with uploads_folder():
            serve(board_of(draw, place, LOOK, 0 if is_demo else board.upload_bytes), place)
    finally:
        place.taken.close()
    return 0


def _demo_keys() -> dict[str, str]:
    """The model that a page in public talks with: `DEMO_MODEL` and `DEMO_TEMPLATE`, else the one that needs no hub."""
    from finery.models.demo_model import demo_model

    keys = {"model_name_or_path": os.environ.get("DEMO_MODEL") or str(demo_model()), "template": os.environ.get("DEMO_TEMPLATE", "")}
    return {key: value for key, value in keys.items() if value}


def roots_of(more: list[Path]) -> "Roots":
    """Where the command stands, what was opened beside it, and the caches of models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from finery.data.registry import PACKAGED
    from finery.web.roots import Roots

    for folder in more:
        if not folder.is_dir():
            raise UserError(f"'--root' names {folder}, which is no folder")
    return Roots([folder.expanduser().resolve() for folder in (Path.cwd(), *more, cache_folder(), Path(HF_HUB_CACHE), PACKAGED)])
