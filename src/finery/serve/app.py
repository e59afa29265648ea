"""The routes. Each reads a request of its shape, has it prepared outside of the loop, and hands it to the desk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finery import __version__
from finery.data.template import Template
from finery.engines.base import Ask, Engine
from finery.log import get_logger
from finery.serve import chats, completions
from finery.serve.doors import Doors
from finery.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from finery.serve.refusals import Refusal, bad, of_validation
from finery.serve.replies import StreamReply, WholeReply, refused
from finery.serve.service import Service, Settings

log = get_logger(__name__)

Asked = TypeVar("Asked", bound=BaseModel)


def build_app(engine: Engine, template: Template, settings: Settings) -> FastAPI:
    """The app of a loaded model; `app.state.service` is what its routes share."""
    service = Service(engine, template, settings)
    app = FastAPI(title=f"Finery: {settings.name}", version=__version__, root_path=settings.root_path, redoc_url=None)
    app.router.redirect_slashes = False
    app.state.service = service
    _add_errors(app)
    _add_looking(app, service)
    _add_answering(app, service)
    _describe(app)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(Doors, service=service)
    return app


def _add_errors(app: FastAPI) -> None:
    """Everything that goes wrong has OpenAI's shape."""

    async def told(request: Request, error: Exception) -> Response:
        return refused(error if isinstance(error, Refusal) else Refusal(500, "The server failed; its log tells more."))

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {404: f"There is no {request.method} {request.url.path[:200]} here; /docs lists what there is.", 405: "Method not allowed."}
        said = texts.get(error.status_code, str(error.detail))
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        return refused(Refusal(error.status_code, said, code=code, headers=error.headers))

    app.add_exception_handler(Refusal, told)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(Exception, told)


def _add_looking(app: FastAPI, service: Service) -> None:
    """Routes that generate nothing."""

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "finery"}

    @app.get("/health")
    async def health() -> Response:
        """Whether the server takes requests."""
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures, for Prometheus."""
        return PlainTextResponse(service.metrics.text(service.desk.running, service.desk.waiting), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        """Names that `model` may have: the model's own first, then those of its adapters."""
        return JSONResponse({"object": "list", "data": [card(name) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        service.adapter(name)
        return JSONResponse(card(name))


def _add_answering(app: FastAPI, service: Service) -> None:
    """Routes that the engine works for."""
    most_seconds = 2 * service.settings.most_seconds + 30  # answers end in half of it: whoever has not read them by then never will

    def reply(kind: Any, asked: ChatRequest | CompletionRequest, prepared: Any, asks: Sequence[Ask]) -> Response:
        """What a `kind` (the module) makes of answers, in pieces or whole; a client that leaves ends them."""
        answers = service.desk.open(asks)
        if asked.stream:
            return StreamReply(kind.chunks(service, asked, prepared, answers), answers.close, most_seconds)
        return WholeReply(kind.whole(service, asked, prepared, answers), answers.close, most_seconds)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await _read(request, ChatRequest, service)
        prepared = await service.prepare(lambda: chats.prepare(service, asked))
        return reply(chats, asked, prepared, prepared.asks)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        """Go on with a text, or with several."""
        asked = await _read(request, CompletionRequest, service)
        asks = await service.prepare(lambda: completions.prepare(service, asked))
        return reply(completions, asked, asks, asks)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        """Texts as vectors: the mean of the last hidden states of their tokens, not scaled to a length."""
        asked = await _read(request, EmbeddingRequest, service)
        return JSONResponse(await completions.embeddings(service, asked))

    @app.post("/v1/score/evaluation")
    async def score(request: Request) -> Response:
        """Scores of reward models, of which there are none yet."""
        raise Refusal(405, "This is no reward model: it scores nothing.", code="method_not_allowed", headers={"Allow": ""})


async def _read(request: Request, shape: type[Asked], service: Service) -> Asked:
    """The body of a request, which is logged only where that was asked for."""
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Refusal(400, "The client has gone before its body was whole.", code="client_gone") from None
    if service.settings.verbose:
        log.info("%s %s", request.url.path, body.decode("utf-8", "replace"))
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from None
    except RecursionError:
        raise bad("The body is nested too deeply.", code="invalid_json") from None


def _describe(app: FastAPI) -> None:
    """Tell /docs of the bodies, which are read by hand."""
    shapes = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/embeddings": EmbeddingRequest}
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        for path, shape in shapes.items():
            schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            found.setdefault("components", {}).setdefault("schemas", {}).update(schema.pop("$defs", {}))
            found["paths"][path]["post"]["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return found

    app.openapi = openapi  # type: ignore[method-assign]
