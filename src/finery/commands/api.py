"""Serve a model to programs that talk to OpenAI: chats, completions, embeddings, tools, streams."""

import os
import secrets
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finery.addresses import address_of, bound, is_local, port_of
from finery.commands.chat import open_engine
from finery.compat import give_back_memory, is_on, need
from finery.run import Run


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery api RUN.yaml [--host HOST] [--port PORT] [key=value | --key value] ..."
    parser.add_argument("--host", help="the address to listen on (API_HOST, else 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="the port (API_PORT, else 8000; 0: any that is free)")


def run(args: Namespace, words: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    for package in ("fastapi", "uvicorn"):
        need(package, "it serves")
    from finery.serve.app import build_app
    from finery.serve.server import Server, serve

    give_back_memory()
    chosen = Run.read(words)
    host = args.host or os.environ.get("API_HOST") or "127.0.0.1"
    port = args.port if args.port is not None else port_of("API_PORT", 8000)
    settings = settings_for(chosen, host, os.environ)
    taken = bound(host, port, "API_PORT")
    engine, template = open_engine(chosen)
    try:
        app = build_app(engine, template, settings)
        service = app.state.service

        def started() -> None:
            print(f"serving {', '.join(service.models)}\nat {address_of(taken)}/v1 (its pages: {address_of(taken)}/docs)", flush=True)
            if settings.key and not os.environ.get("API_KEY"):
                print(f"with the key {settings.key} (made up, since others reach {host} and API_KEY is not set)", flush=True)

        serve(Server(app, service, started), taken)
        service.close()
    finally:
        engine.close()
        taken.close()
    return 0


def settings_for(chosen: Run, host: str, environment: Mapping[str, str]) -> Any:
    """How the run's model is served at `host`; a key is made up where others can reach it and none is given."""
    from finery.serve.service import Settings, settings_of

    own = settings_of(environment)
    key = environment.get("API_KEY") or None
    settings = Settings(
        name=environment.get("API_MODEL_NAME") or _name(chosen),
        generation=chosen.generation,
        thinking=chosen.template.enable_thinking,
        root_path=environment.get("FASTAPI_ROOT_PATH", "").rstrip("/"),
        verbose=is_on("API_VERBOSE", environment),
        **{name: value for name, value in own.items() if name != "hosts"},
    )
    if not is_local(host):
        return replace(settings, key=key or secrets.token_urlsafe(24), hosts=own.get("hosts"))
    return replace(settings, key=key, hosts=own.get("hosts", ()) if key is None else own.get("hosts"))


def _name(chosen: Run) -> str:
    """The folder of what was trained, where there is one, else the model's."""
    folder = chosen.loop.output_dir
    base = folder if folder and Path(folder).is_dir() else str(chosen.model.model_name_or_path)
    return Path(base).resolve().name if Path(base).exists() else base.rstrip("/")
