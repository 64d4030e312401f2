"""A solver to take away: what is in the zip, byte for byte, what is left out or refused, and the upload to a hub."""

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import pytest
import structlog
from finished_run import examine, finished_run, make, weights_at
from hub_server import Hub, hub_of
from hypothesis import given
from hypothesis import strategies as st
from using_world import ended

from services.trainer.export import hub_token, main, parsed, repository_of, write_zip
from services.trainer.rounds import paths_of
from shared.command import UsageError
from shared.files import MANIFEST, ArtifactError, hash_file, read_manifest
from shared.settings import Settings, changed

LOG: Any = structlog.wrap_logger(structlog.ReturnLogger())
TOKEN = "hf_planted-and-secret"
INSIDE = {
    "README.md", "config.json", "model.safetensors", "evaluation.json", "questions.parquet", "report.html",
    *(f"manifests/{name}.json" for name in ("weights", "training", "seeds", "questions", "papers", "corpus",
                                           "evaluation", "report")),
}  # fmt: skip


def exported(settings: Settings, *words: str) -> Path:
    main(parsed(list(words)), settings, LOG)
    (file,) = (settings.storage.data_dir / "exports").iterdir()
    return file


def names_in(file: Path) -> set[str]:
    with ZipFile(file) as archive:
        return {name.partition("/")[2] for name in archive.namelist()}


def read(file: Path, name: str) -> str:
    with ZipFile(file) as archive:
        (found,) = [one for one in archive.namelist() if one.partition("/")[2] == name]
        return archive.read(found).decode()


# --- the zip


def test_the_zip_has_one_folder_with_the_weights_the_card_and_all_that_tells_of_them(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    file = exported(settings)
    assert file.name == "demo-1-solver.zip"
    assert names_in(file) == INSIDE
    with ZipFile(file) as archive:
        assert archive.testzip() is None
        assert {name.partition("/")[0] for name in archive.namelist()} == {"demo-1-solver"}
        assert {one.compress_type for one in archive.infolist()} == {ZIP_STORED}
        assert {one.external_attr >> 16 for one in archive.infolist()} == {0o100644}
        archive.extractall(tmp_path / "out")
    folder = tmp_path / "out" / "demo-1-solver"
    weights = read_manifest(weights_at(settings))
    assert (folder / "manifests/weights.json").read_bytes() == (weights_at(settings) / MANIFEST).read_bytes()
    for name in weights.files.keys() - {"README.md"}:
        assert hash_file(folder / name) == weights.files[name]
    assert "| kept_out (4) | 0.250 " in (folder / "README.md").read_text(encoding="utf-8")


def test_the_same_artifacts_give_the_same_bytes_on_any_day_and_disk(tmp_path: Path) -> None:
    settings = finished_run(tmp_path / "one")
    first = exported(settings)
    copy = tmp_path / "two"
    shutil.copytree(tmp_path / "one", copy, symlinks=True, ignore=shutil.ignore_patterns("exports"))
    for path in copy.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1, 1))
            path.chmod(0o700)
    other = changed(settings, {"storage.data_dir": copy / "data"})
    second = exported(other)
    assert first.read_bytes() == second.read_bytes()
    assert exported(settings).read_bytes() == second.read_bytes()


@given(st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0/\\"), min_size=1), st.binary()))
def test_a_zip_holds_what_it_was_given_and_its_bytes_follow_from_that(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("zip")
    plain: dict[str, Path | bytes] = dict(contents)
    files: dict[str, Path | bytes] = {}
    for number, (name, content) in enumerate(contents.items()):
        (folder / str(number)).write_bytes(content)
        files[name] = folder / str(number)
    write_zip(plain, folder / "a.zip")
    write_zip(files, folder / "b.zip")
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()
    with ZipFile(folder / "a.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == contents


def test_a_zip_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "some.zip"
    target.write_bytes(b"before")
    with pytest.raises(FileNotFoundError):
        write_zip({"one": b"1", "two": tmp_path / "gone"}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["some.zip"]
    assert target.read_bytes() == b"before"


def test_the_newest_round_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    settings = finished_run(tmp_path, rounds=2)
    for words, number in (([], 2), (["--round", "1"], 1)):
        target = tmp_path / "some" / f"{number}.zip"
        main(parsed([*words, "--to", str(target)]), settings, LOG)
        assert read(target, "model.safetensors").startswith(f"weights {number}")
        assert read(target, "report.html") == f"<h1>Report {number}</h1>"
    with pytest.raises(UsageError, match=r"weights of the solver of round 3 .*found those of \[1, 2\]"):
        main(parsed(["--round", "3"]), settings, LOG)


def test_without_any_round_it_is_said_what_to_do(tmp_path: Path) -> None:
    status, output, errors = ended("export", settings=changed(finished_run(tmp_path), {"trainer.run": "other"}))
    assert (status, output) == (1, "")
    assert re.fullmatch(r"trainer: expected weights of the solver of any round .* found those of none; .*\n", errors)


# --- what is left out, what is refused


def test_what_belongs_to_other_weights_is_left_out(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    paths = paths_of(settings, 1, "solver")
    make(paths.weights, {"model.safetensors": "newer"}, training=paths.training)
    file = exported(settings)
    missing = {"evaluation.json", "report.html", "manifests/evaluation.json", "manifests/report.json", "config.json"}
    assert names_in(file) == INSIDE - missing
    assert "Not evaluated." in read(file, "README.md")
    examine(settings, 1)
    assert names_in(exported(settings)) == INSIDE - {"config.json"}


def test_a_corpus_that_was_made_anew_is_not_said_to_be_that_of_the_weights(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    make(paths_of(settings, 1, "solver").corpus, {"other": "papers"})
    file = exported(settings)
    assert names_in(file) == INSIDE - {"manifests/corpus.json"}
    assert "Corpus" not in read(file, "README.md")


def test_questions_that_were_written_anew_are_left_out_with_what_they_came_from(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    paths = paths_of(settings, 1, "solver")
    make(paths.questions, {"questions.parquet": "other"}, seeds=paths_of(settings, 1, "proposer").seeds)
    gone = {"questions.parquet", *(f"manifests/{name}.json" for name in ("questions", "papers", "corpus"))}
    assert names_in(exported(settings)) == INSIDE - gone


@pytest.mark.parametrize("name", ["weights/model.safetensors", "weights/config.json"])
def test_damaged_weights_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    settings = finished_run(tmp_path)
    (weights_at(settings).parent / name).write_text("damaged", encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not have the content its manifest names"):
        exported(settings)
    assert not (settings.storage.data_dir / "exports").exists()


@pytest.mark.parametrize("name", ["questions/questions.parquet", "evaluation/evaluation.json", "report/report.html"])
def test_so_is_what_goes_along(tmp_path: Path, name: str) -> None:
    settings = finished_run(tmp_path)
    (paths_of(settings, 1, "solver").kept.parent / name).write_text("damaged", encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not have the content its manifest names"):
        exported(settings)


def test_weights_beside_another_training_are_refused(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    paths = paths_of(settings, 1, "solver")
    make(paths.training, {"metrics.jsonl": "newer"}, seeds=paths.seeds)
    with pytest.raises(ArtifactError, match="run the stage solver_publish again"):
        exported(settings)


def test_a_folder_as_target_and_a_full_disk_are_said(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    with pytest.raises(UsageError, match="found a folder"):
        main(parsed(["--to", str(tmp_path)]), settings, LOG)
    with pytest.raises(ArtifactError, match="GB of free disk"):
        main(parsed([]), changed(settings, {"storage.min_free_gb": 1e9}), LOG)


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "/b", "a/", "../b", "a b/c", "ä/b", "a/b\n"])
def test_a_repository_is_owner_and_name(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected owner/name"):
        repository_of(text)


# --- the hub


def pushed(settings: Settings, hub: Hub, folder: Path, token: str = TOKEN) -> tuple[int, str]:
    """Push as a process that logs all it can; exit status and everything that it wrote."""
    home = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    told = changed(settings, {"log.level": "debug"})
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    status, output, errors = ended("export", "--push", "acme/solver", settings=told, **home, **given)
    return status, output + errors


def test_weights_and_card_are_pushed_in_one_commit_to_a_private_repository_and_the_token_is_never_shown(
    tmp_path: Path,
) -> None:
    settings = finished_run(tmp_path)
    with hub_of() as hub:
        status, said = pushed(settings, hub, tmp_path)
    assert status == 0
    assert hub.made == [{"organization": "acme", "name": "solver", "visibility": "private"}]
    (files,) = hub.commits
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (weights_at(settings) / "model.safetensors").read_bytes()
    assert b"| kept_out (4) |" in files["README.md"]
    assert not (settings.storage.data_dir / "exports").exists()
    assert f"Bearer {TOKEN}" in {authorization for _, _, authorization in hub.asked}
    assert TOKEN not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("end", "status"),
    [("/repos/create", 401), ("/preupload/main", 403), ("/objects/batch", 400), ("/commit/main", 403)],
)
def test_a_hub_that_refuses_is_said_in_one_sentence_without_the_token(tmp_path: Path, end: str, status: int) -> None:
    settings = finished_run(tmp_path)
    with hub_of(refuses={end: (status, f"no: {TOKEN}")}) as hub:
        found, said = pushed(settings, hub, tmp_path)
    sentence = [line for line in said.splitlines() if line.startswith("trainer: ")]
    assert found == 1
    assert len(sentence) == 1
    assert "expected to push to acme/solver, but the hub refuses" in sentence[0]
    assert said.splitlines()[-1] == sentence[0]
    assert TOKEN not in said
    assert hub.commits == []


def test_a_hub_that_is_away_is_said(tmp_path: Path) -> None:
    settings = finished_run(tmp_path)
    status, said = pushed(settings, Hub("http://127.0.0.1:9"), tmp_path)
    assert status == 1
    assert "out of reach" in said
    assert TOKEN not in said


def test_without_a_token_nothing_is_asked(tmp_path: Path) -> None:
    with hub_of() as hub:
        status, said = pushed(finished_run(tmp_path), hub, tmp_path, token=" ")
    assert (status, hub.asked) == (1, [])
    assert "expected a Hugging Face token with write access in HF_TOKEN, found none" in said


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_ä", "hf_a b", "hf_\x1b"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="characters that no token has") as error:
        hub_token()
    assert token not in str(error.value)


def test_the_licence_of_a_base_on_the_hub_is_asked_there(tmp_path: Path) -> None:
    settings = finished_run(tmp_path, base="acme/base")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    with hub_of(cards={"acme/base": "---\nlicense: other\nlicense_name: acme-1\n---\n# Base\n"}) as hub:
        assert ended("export", settings=settings, HF_ENDPOINT=hub.url, **home)[0] == 0
    file = settings.storage.data_dir / "exports" / "demo-1-solver.zip"
    for line in ("base_model: acme/base", "license: other", "license_name: acme-1", "- Base model: acme/base"):
        assert line in read(file, "README.md").splitlines()
    assert TOKEN not in read(file, "README.md")


def test_a_hub_out_of_reach_leaves_the_licence_unknown(tmp_path: Path) -> None:
    settings = finished_run(tmp_path, base="acme/base")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ended("export", settings=settings, **home)[0] == 0
    card = read(settings.storage.data_dir / "exports" / "demo-1-solver.zip", "README.md")
    assert "- Licence: unknown: see the base model" in card
