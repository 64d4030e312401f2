"""Which weights :8001 serves: the driver names them, loads them in place, and checks that they are there.

`serve` first writes down what is to be served (`shared/serving.py`), so that a solver that is started again in the
middle of a round comes back with the same weights. Then each address of `solver.url` loads them in place, and is asked
what it serves. Weights whose files do not have the hashes of their manifest are refused before any of that.
"""

import asyncio
from pathlib import Path

import structlog

from shared.balance import addresses_in
from shared.clients import BadReply, Refused, SolverClient
from shared.model_files import resolve_model
from shared.serving import checked_weights, note_served
from shared.settings import Settings


def serve(settings: Settings, model: str, log: structlog.stdlib.BoundLogger) -> None:
    """Have every solver serve `model`, a folder or what `solver.model` may be; returns when they do.

    Raises ArtifactError for weights that are damaged, and a ServiceError when a solver does not take them.
    """
    folder = checked_weights(resolve_model(model, settings))
    note_served(settings, folder)
    for address in addresses_in(settings.solver.url):
        if asyncio.run(load_at(address, folder, patience_s=settings.trainer.start_patience_s)):
            log.info("solver serves other weights", solver=address, weights=folder)


async def load_at(address: str, folder: str, *, patience_s: float) -> bool:
    """Have one solver serve `folder`; returns whether it had served something else."""
    async with SolverClient(address, patience_s=patience_s) as solver:
        if await served_by(solver) == folder:
            return False
        try:
            await solver.call("POST", "/update_weights_from_disk", {"model_path": folder})
        except Refused as error:
            raise Refused(
                "solver",
                f"expected {address} to load {folder}, but it refuses ({error}); it must see the same data folder and "
                "serve a model of the same shape (DRZERO_SOLVER__MODEL)",
            ) from error
        found = await served_by(solver)
    if found != folder:
        raise BadReply("solver", f"expected {address} to serve {folder}, found {found}; start it again")
    return True


async def served_by(solver: SolverClient) -> str:
    """The folder or id whose weights a solver serves now, links resolved."""
    info = await solver.call("GET", "/get_model_info")
    if not isinstance(info, dict) or not isinstance(info.get("model_path"), str):
        raise BadReply("solver", f"expected model_path in /get_model_info, found {info!r}")
    return resolved(info["model_path"])


def resolved(model: str) -> str:
    """A folder with links resolved, or a Hugging Face id as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
