"""Which weights the solver service serves: those of its setting, until a run's driver names others of the same shape.

The driver notes them in `<data>/serving.json` before the running service loads them in place; a service that starts
later reads the note. It holds for the model of the setting only: with another `solver.model` it is left alone.
"""

import json
from pathlib import Path

from shared.files import MANIFEST, ArtifactError, read_manifest, write_atomically
from shared.model_files import resolve_model
from shared.settings import Settings


def note_path(settings: Settings) -> Path:
    """The file of the note."""
    return settings.storage.data_dir / "serving.json"


def note_served(settings: Settings, weights: str) -> None:
    """Note which weights are to be served instead of the model that the service was started with."""
    started_with = settings.solver.in_place_of or settings.solver.model
    write_atomically(
        note_path(settings), json.dumps({"instead_of": started_with, "weights": weights}) + "\n", alone=True
    )


def weights_to_serve(settings: Settings) -> str:
    """The folder or id that the service loads when it starts; ArtifactError when noted weights are damaged or gone."""
    note = note_path(settings)
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["instead_of"] == settings.solver.model:
            try:
                return checked_weights(found["weights"])
            except ArtifactError as error:
                raise ArtifactError(f"{note} names weights that cannot be served: {error}; or delete {note}") from error
    return resolve_model(settings.solver.model, settings)


def checked_weights(model: str) -> str:
    """`model` with links resolved; its files are hashed where it has a manifest. ArtifactError when they differ.

    A Hugging Face id and a folder that this project has not made have no manifest, and pass.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute():
            raise ArtifactError(f"expected weights in {folder}, found none; run the stage that publishes them")
        return model
    if (folder / MANIFEST).is_file():
        read_manifest(folder, verify=True)
    return str(folder.resolve())
