"""The CPU solver: transformers' own OpenAI handlers, completed where they lack what we need.

What transformers brings: request validation, chat templates, replies. What is added here: temperature, seed and a
regular expression per request (its continuous batching takes the first request's temperature for all, its handlers seed
the whole process), an end to the work for clients that hang up, a bounded queue (503 with Retry-After), /metrics, and
/update_weights_from_disk and /get_model_info with SGLang's request and reply.
"""

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from shared.access import Access, api_token
from shared.generation import GenerationEngine, GenerationError, load_engine, load_folder
from shared.hang_up import unless_gone
from shared.hardware import cpu_dtype
from shared.metrics import REGISTRY, SECONDS, from_zero, metrics_text
from shared.settings import SolverSettings

REQUESTS = Counter("drzero_solver_requests_total", "Answered requests.", ["route", "status"], registry=REGISTRY)
LATENCY = Histogram(
    "drzero_solver_request_seconds", "Time to the reply.", ["route"], buckets=SECONDS, registry=REGISTRY
)
PENDING = Gauge("drzero_solver_pending_requests", "Requests running or waiting.", registry=REGISTRY)
LIMIT = Gauge("drzero_solver_pending_limit_requests", "Most requests running and waiting.", registry=REGISTRY)
TOKENS = Counter("drzero_solver_tokens_total", "Tokens by kind.", ["kind"], registry=REGISTRY)
WEIGHTS = Counter("drzero_solver_weight_updates_total", "Changes of the weights.", ["outcome"], registry=REGISTRY)
from_zero(TOKENS, "prompt", "new")
from_zero(WEIGHTS, "done", "refused")
RETRY_AFTER_S = 1
# OpenAI fields that transformers' continuous batching would silently ignore, with the value that changes nothing.
UNSERVED = {"n": 1, "best_of": 1, "stream": False, "stop": None, "top_p": 1, "logprobs": None, "echo": False}
SEEDS = 2**63  # seeds lie below
CLIENT_GONE = 499  # counted, never read
# Of the request at hand: transformers' handlers have no place for them on the way to the engine.
SEED: ContextVar[int | None] = ContextVar("seed", default=None)
REGEX: ContextVar[str | None] = ContextVar("regex", default=None)  # what the text must match, as SGLang takes it


class WeightUpdate(BaseModel):
    """SGLang's request for other weights; its further fields are accepted and have no meaning here."""

    model_path: str


class Served:
    """The engine, where its weights came from, and transformers' handlers around it."""

    def __init__(self, solver: SolverSettings, folder: str) -> None:
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler

        self.solver = solver
        self.folder = folder
        self.engine: GenerationEngine = load_engine(
            folder,
            dtype=cpu_dtype(solver.dtype),
            threads=solver.threads,
            context_tokens=solver.context_tokens,
            max_running=solver.max_running,
        )
        parts: dict[str, Any] = {"model_manager": OneModel(self), "generation_state": EngineState(self.engine)}
        self.completions = CompletionHandler(**parts)
        self.chat = ChatCompletionHandler(**parts)

    async def update_weights(self, folder: str) -> None:
        """Serve other weights of the same shape; raises ValueError when they do not fit or are not there."""
        await self.engine.replace_weights(lambda model: load_folder(model, Path(folder)))
        self.folder = folder


class OneModel:
    """What transformers' handlers ask of their model manager, for one model that is always loaded."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.force_model = served.solver.served_name

    @staticmethod
    def process_model_name(name: str) -> str:
        """The handlers' canonical name of a model: here there is just one."""
        return name

    def load_model_and_processor(self, _: str) -> tuple[Any, Any]:
        """The loaded model and its tokenizer."""
        return self._served.engine.model, self._served.engine.tokenizer

    @staticmethod
    def get_model_modality(_model: Any, processor: Any = None) -> Any:
        """Text in, text out."""
        from transformers.cli.serving.utils import Modality

        return Modality.LLM


class EngineState:
    """What transformers' handlers ask of their generation state: our engine for every request."""

    _compile = False

    def __init__(self, engine: GenerationEngine) -> None:
        self._manager = EngineManager(engine)

    @staticmethod
    def use_continuous_batching(_model: Any, _modality: Any) -> bool:
        """All requests are generated together."""
        return True

    def get_manager(self, _model_id: str, *, use_cb: bool) -> "EngineManager":
        """The one manager."""
        return self._manager


class EngineManager:
    """transformers' generate-manager protocol on GenerationEngine."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine

    def init_cb(self, _model: Any, _config: Any) -> None:
        """The engine runs already."""

    async def generate_non_streaming(
        self, _model: Any, processor: Any, inputs: dict[str, Any], gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Text, number of prompt tokens and new token ids of one request."""
        prompt = list(inputs["input_ids"])
        temperature = 0.0 if gen_config.do_sample is False else (gen_config.temperature or 1.0)
        left = self._engine.context_tokens - len(prompt)
        budget = min(gen_config.max_new_tokens, left) if left > 0 else gen_config.max_new_tokens
        done = await self._engine.generate(
            prompt, max_new_tokens=budget, temperature=temperature, regex=REGEX.get(), seed=SEED.get()
        )
        TOKENS.labels("prompt").inc(len(prompt))
        TOKENS.labels("new").inc(len(done.token_ids))
        return processor.decode(done.token_ids, skip_special_tokens=True), len(prompt), done.token_ids

    def generate_streaming(self, *_: Any, **__: Any) -> Any:
        """Streaming is refused: no client of ours uses it."""
        raise GenerationError("streaming is not served by the CPU solver; send the request without `stream`")


def objection(body: Mapping[str, Any]) -> str:
    """Why a request is not served, or ""."""
    for name, neutral in UNSERVED.items():
        if body.get(name) not in (None, neutral):
            return f"the CPU solver does not serve {name!r} other than {neutral!r}; it got {body[name]!r}"
    seed = body.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < SEEDS):  # True is an int too
        return f"expected 'seed' to be an integer from 0 to 2**63 - 1, found {seed!r}; mend it or leave it out"
    if not isinstance(body.get("regex", ""), str):
        return f"expected 'regex' to be a text, found {body['regex']!r}; mend it or leave it out"
    return ""


def create_app(solver: SolverSettings, folder: str) -> FastAPI:
    """The FastAPI application; the model is loaded when the application starts."""
    served: list[Served] = []
    LIMIT.set(solver.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.append(Served(solver, folder))
        yield
        served[0].engine.stop()

    app = FastAPI(title="Dr. Zero solver", lifespan=lifespan)
    app.add_middleware(Access, token=api_token())

    @app.exception_handler(GenerationError)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        dead = served[0].engine.failure is not None
        return JSONResponse({"error": {"message": str(error)}}, status_code=503 if dead else 400)

    async def handle(request: Request, body: dict[str, Any], work: Callable[..., Awaitable[Response]]) -> Response:
        route = request.url.path
        started = time.monotonic()
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        if served[0].engine.running >= solver.max_waiting:
            REQUESTS.labels(route, "503").inc()
            return JSONResponse(
                {"error": {"message": f"{solver.max_waiting} requests are waiting already; try again"}},
                status_code=503,
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        message = objection(body)
        if message:
            REQUESTS.labels(route, "400").inc()
            return JSONResponse({"error": {"message": message}}, status_code=400)
        SEED.set(body.pop("seed", None))
        REGEX.set(body.pop("regex", None))
        status = "error"
        try:
            response = await unless_gone(request.receive, work(body, request_id)) or Response(status_code=CLIENT_GONE)
            status = str(response.status_code)
            response.headers["x-request-id"] = request_id
            return response
        finally:
            REQUESTS.labels(route, status).inc()
            LATENCY.labels(route).observe(time.monotonic() - started)

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Response:
        return await handle(request, body, served[0].completions.handle_request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Response:
        return await handle(request, body, served[0].chat.handle_request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": solver.served_name, "object": "model", "owned_by": "drzero"}]}

    @app.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        return {"model_path": served[0].folder, "is_generation": True}

    @app.post("/update_weights_from_disk")
    async def update_weights(update: WeightUpdate) -> JSONResponse:
        try:
            await served[0].update_weights(update.model_path)
        except (ValueError, OSError) as error:
            WEIGHTS.labels("refused").inc()
            return JSONResponse({"success": False, "message": str(error)}, status_code=400)
        WEIGHTS.labels("done").inc()
        return JSONResponse({"success": True, "message": f"serving {update.model_path}"})

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = served[0].engine.failure
        if failure is not None:
            return JSONResponse({"status": "dead", "reason": failure}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        PENDING.set(served[0].engine.running)
        body, kind = metrics_text()
        return Response(body, media_type=kind)

    return app


def serve(solver: SolverSettings, folder: str, listener: socket.socket) -> None:
    """Answer on `listener` until the process is stopped."""
    server = uvicorn.Server(uvicorn.Config(create_app(solver, folder), log_config=None, access_log=False))
    asyncio.run(server.serve(sockets=[listener]))
