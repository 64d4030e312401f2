"""verl's rollout protocol on `shared.generation`: what SGLang is on a GPU, transformers is here.

`CpuReplica` starts one Ray actor per replica that holds the model and generates all rollouts in flight together; it
returns the sampled token ids and the log-probabilities they were drawn with. `CpuServerAdapter` lives in the training
worker and sends it the weights after each update.
"""

from collections.abc import AsyncIterable, Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from shared.generation import copy_weights, load_engine
from shared.hardware import cpu_dtype
from shared.settings import load_settings

SERVER = "transformers_server_{rank}"
SAFETY_TOKENS = 8  # room for the turn markers that verl puts between turns


class CpuServerAdapter(BaseRollout):  # type: ignore[misc]
    """The training worker's hand on the rollout server."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """The rollout's memory is not the trainer's: nothing to release."""

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        """Send the trained weights, (name, tensor) pairs, to the server."""
        state = {}
        async for name, tensor in _pairs(weights):
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            state[name] = full.detach().to(torch.bfloat16) if full.dtype == torch.float32 else full.detach()
        server = ray.get_actor(SERVER.format(rank=0))
        await server.load_weights.remote(state, global_steps)


class CpuServer:
    """The Ray actor that generates."""

    def __init__(self, model: str, context_tokens: int, max_running: int) -> None:
        self._model = model
        self._context = context_tokens
        self._max_running = max_running
        self._engine: Any = None
        self._step: int | None = None

    async def start(self) -> None:
        """Load the model; the engine needs the actor's event loop."""
        actor = load_settings().trainer.actor
        self._engine = load_engine(
            self._model,
            dtype=cpu_dtype(actor.rollout_dtype),
            threads=actor.rollout_threads,
            context_tokens=self._context,
            max_running=self._max_running,
        )

    async def load_weights(self, state: dict[str, torch.Tensor], step: int | None) -> None:
        """Generate with these weights from now on."""
        await self._engine.replace_weights(lambda model: copy_weights(model, state))
        self._step = step

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """One turn of one rollout: token ids in, token ids and log-probabilities out."""
        budget = min(sampling_params["max_tokens"], self._context - len(prompt_ids))
        done = await self._engine.generate(
            list(prompt_ids),
            max_new_tokens=budget,
            temperature=sampling_params["temperature"],
            regex=sampling_params.get("regex"),
        )
        return TokenOutput(
            token_ids=done.token_ids,
            log_probs=done.log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self._step},
        )

    async def wake_up(self) -> None:
        """verl's cycle of GPU memory has no meaning here."""

    async def sleep(self) -> None:
        """As wake_up."""

    async def clear_kv_cache(self) -> None:
        """The cache is dropped with each change of weights."""

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Synchronous training has nothing in flight when verl asks."""

    async def resume_generation(self) -> None:
        """Nothing was aborted."""


class CpuReplica(RolloutReplica):  # type: ignore[misc]
    """verl's handle on the server."""

    async def launch_servers(self) -> None:
        """Start the Ray actor and wait until its model is loaded."""
        settings = load_settings().trainer
        context = settings.prompt_tokens + settings.response_tokens + SAFETY_TOKENS
        running = settings.prompts_per_step * settings.rollouts_per_prompt
        actor = ray.remote(num_cpus=0, max_concurrency=1000)(CpuServer)
        name = SERVER.format(rank=self.replica_rank)
        server = actor.options(name=name).remote(self.model_config.path, context, running)
        await server.start.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"transformers:{self.replica_rank}"


async def _pairs(weights: AsyncIterable[Any] | Iterable[Any]) -> Any:
    if hasattr(weights, "__aiter__"):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair
