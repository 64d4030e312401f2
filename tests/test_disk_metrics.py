"""What the files of a run take, as /metrics shows it."""

from pathlib import Path

from services.trainer.disk_metrics import show_disk
from shared.metrics import REGISTRY
from shared.settings import Settings, changed


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"drzero_trainer_storage_{name}", labels)


def test_kept_files_and_scratch_are_measured_beside_budget_and_free_disk(tmp_path: Path) -> None:
    places = {"storage.data_dir": tmp_path / "data", "storage.scratch_dir": tmp_path / "scratch"}
    settings = changed(Settings(), {**places, "storage.budget_gb": 3.0, "storage.min_free_gb": 1.5})
    for folder, sizes in (("data/runs/demo", (1000, 234)), ("scratch", (99,))):
        (tmp_path / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            (tmp_path / folder / f"{number}").write_bytes(b"x" * size)
    (tmp_path / "data/again").hardlink_to(tmp_path / "data/runs/demo/0")
    show_disk(settings)
    assert shown("bytes", place="kept") == 1234  # a file with two names counts once
    assert shown("bytes", place="scratch") == 99
    assert shown("budget_bytes") == 3e9
    assert shown("min_free_bytes") == 1.5e9
    assert (shown("free_bytes", place="kept") or 0) > 0


def test_folders_that_are_not_there_yet_take_nothing(tmp_path: Path) -> None:
    places = {"storage.data_dir": tmp_path / "no", "storage.scratch_dir": tmp_path / "none"}
    show_disk(changed(Settings(), places))
    assert shown("bytes", place="kept") == shown("bytes", place="scratch") == 0
