"""Talk to a model in the browser: a page of one model, in five languages."""

import os
from argparse import ArgumentParser, Namespace

from finery.commands.chat import open_engine
from finery.compat import give_back_memory, need, num_ranks
from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery webchat RUN.yaml [--host HOST] [--port PORT] [--auth USER:PASSWORD] [key=value | --key value] ..."
    parser.add_argument("--host", help="the address to listen on (GRADIO_SERVER_NAME, else 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="the port (GRADIO_SERVER_PORT, else the first free one from 7860 on)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for them; without, others need the token that is printed")


def run(args: Namespace, words: list[str]) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asked for when gradio is imported
    need("gradio", "it draws the page")
    if num_ranks() > 1:
        raise UserError("`finery webchat` serves from one process: start it without torchrun")
    from finery.talks.speaker import Speaker
    from finery.web.server import app_of, place_for, serve
    from finery.web.webchat import build, look

    give_back_memory()
    chosen = Run.read(words)
    place = place_for(args.host, args.port, args.auth)
    try:
        log.info("loading %s; the page comes after it", chosen.model.model_name_or_path)
        engine, template = open_engine(chosen)
        try:
            serve(app_of(build(Speaker(engine, template, chosen)), place, look()), place)
        finally:
            engine.close()
    finally:
        place.taken.close()
    return 0
