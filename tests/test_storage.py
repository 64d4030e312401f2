"""What uses the disk, what of it may go, in which order, and that nothing else ever goes."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.trainer.disk_estimate import estimate
from services.trainer.disk_parts import (
    BUSY,
    FREED,
    JOURNAL,
    LAST_GOOD,
    NAMED,
    NEWEST,
    UNFINISHED,
    inventory,
    run_paths_at,
    scan,
)
from services.trainer.disk_plan import Inode, Origin, Part, Wanted, choose, freed, in_order, shares, total
from services.trainer.paths import RunPaths
from services.trainer.rounds import Role
from services.trainer.storage import (
    driven,
    free,
    kept_bytes,
    needed,
    require_budget,
    require_enough,
    warn_of_budget,
)
from shared.command import UsageError
from shared.files import ArtifactError, hash_json, publish, read_manifest, stale_reason, write_atomically
from shared.serving import checked_weights, note_path, note_served
from shared.settings import Settings, build_settings, changed, profiles

MB = 1_000_000
ROOT = Path(__file__).parents[1]


# --- the plan


@st.composite
def disks(draw: st.DrawFn) -> list[Part]:
    """Parts of kept files and scratch that share files with each other, and with names elsewhere."""
    sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    owners = st.lists(st.tuples(st.sampled_from(["kept", "scratch"]), st.integers(0, 5), st.booleans()), max_size=8)
    given_parts = draw(owners)
    names: list[dict[int, int]] = [{} for _ in given_parts]
    links = [draw(st.integers(0, 1)) for _ in sizes]
    for part in names:
        for number in draw(st.sets(st.integers(0, len(sizes) - 1))):
            part[number] = draw(st.integers(1, 2))
            links[number] += part[number]
    inodes = [Inode(1, number, size, links[number]) for number, size in enumerate(sizes)]
    parts = []
    for number, ((place, changed_at, stays), inside) in enumerate(zip(given_parts, names, strict=True)):
        files = {inodes[key]: count for key, count in inside.items()}
        origin = Origin("kept" if place == "kept" else "scratch")
        goes, reason = ({}, "it stays") if stays else (files, "")
        parts.append(Part(Path(f"/{number}"), "part", origin, files, changed_at, goes=goes, stays=reason))
    return parts


wants = st.builds(Wanted, st.integers(0, 120), st.integers(0, 120), st.integers(0, 200))


def left(parts: Sequence[Part], gone: Sequence[Part]) -> int:
    """Bytes on the disk without some parts, name by name: a plain count to compare with."""
    names: dict[Inode, int] = {inode: inode.links for part in parts for inode in part.files}
    for part in gone:
        for inode, count in part.files.items():
            names[inode] -= count
    return sum(inode.size for inode, count in names.items() if count > 0)


@given(disks(), wants)
def test_nothing_that_stays_is_chosen_and_the_bytes_are_those_of_the_disk(parts: list[Part], wanted: Wanted) -> None:
    chosen = choose(parts, wanted)
    assert not [part for part in chosen if part.stays]
    assert len({part.path for part in chosen}) == len(chosen)
    assert freed(chosen) == left(parts, []) - left(parts, chosen)


@given(disks(), wants)
def test_what_is_chosen_suffices_or_is_all_there_is(parts: list[Part], wanted: Wanted) -> None:
    chosen = choose(parts, wanted)
    for place, bytes_wanted in (("kept", wanted.kept), ("scratch", wanted.scratch)):
        there = [part for part in in_order(parts) if part.origin.place == place]
        taken = [part for part in chosen if part.origin.place == place]
        assert freed(taken) >= bytes_wanted or taken == there
    assert freed(chosen) >= wanted.either or chosen == in_order(parts)
    going = [part for part in parts if not part.stays]
    assert freed(in_order(parts)) == freed(going)  # what is left out frees nothing


@given(disks(), wants)
def test_the_oldest_goes_first_and_scratch_before_kept_files(parts: list[Part], wanted: Wanted) -> None:
    chosen = choose(parts, wanted)
    for place in ("kept", "scratch"):
        there = [part for part in in_order(parts) if part.origin.place == place]
        taken = [part for part in chosen if part.origin.place == place]
        assert taken == there[: len(taken)]
        assert [part.changed for part in there] == sorted(part.changed for part in there)
    places = [part.origin.place for part in in_order(parts)]
    assert places == sorted(places, reverse=True)


@given(disks(), wants)
def test_no_more_goes_than_it_takes(parts: list[Part], wanted: Wanted) -> None:
    chosen = choose(parts, wanted)
    for place in ("kept", "scratch"):
        taken = [part for part in chosen if part.origin.place == place]
        if taken:
            asked = wanted.kept if place == "kept" else wanted.scratch
            before = chosen[: chosen.index(taken[-1])]
            assert freed(taken[:-1]) < asked or freed(before) < wanted.either
    assert choose(parts, Wanted()) == []


@given(disks())
def test_a_file_with_several_names_is_counted_once(parts: list[Part]) -> None:
    assert sum(shares(parts)) == total(parts) == left(parts, [])


# --- the disk


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folders = {"storage.data_dir": tmp_path / "data", "storage.scratch_dir": tmp_path / "scratch"}
    return changed(build_settings({}), {**folders, "storage.min_free_gb": 0.0, "storage.budget_gb": 0.0})


def paths_in(settings: Settings, number: int, role: Role) -> RunPaths:
    return run_paths_at(settings, "demo", number, role)


def make(artifact: Path, files: Mapping[str, int] | None = None, **origins: str) -> str:
    """Publish an artifact with files of these sizes; returns its identity."""
    with publish(artifact, settings={"steps": 3}, made_from=origins) as draft:
        for name, size in {"rows.jsonl": 1000, **(files or {})}.items():
            (draft.path / name).write_bytes(f"{artifact}{name}".encode().ljust(size, b"x")[:size])
    return read_manifest(artifact).identity


def checkpoint(paths: RunPaths, step: int, *, complete: bool = True) -> Path:
    actor = paths.checkpoints / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x" * MB)
    (actor / "huggingface" / "model.safetensors").write_bytes(b"x" * MB)
    if complete:
        zipfile.ZipFile(actor.parent / "data.pt", "w").close()
    return actor.parent


def begin(paths: RunPaths) -> None:
    """Scratch of a training that has written two checkpoints and a log."""
    key = hash_json([{"steps": 3}, {"seeds": "s", "base_weights": "b"}])
    write_atomically(paths.work / "state.json", json.dumps({"key": key}))
    (paths.work / "log").mkdir()
    (paths.log / "verl.log").write_text("words")
    for step in (1, 2):
        checkpoint(paths, step)


def end(paths: RunPaths, **origins: str) -> str:
    """The training is finished and its weights are published; returns the weights' identity."""
    training = make(paths.training, None, **{"seeds": "s", "base_weights": "b", **origins})
    weights = {"model.safetensors": 3 * MB, "config.json": 500, "change.json": 100}
    return make(paths.weights, weights, training=training)


def what(settings: Settings, busy: frozenset[str] = frozenset()) -> dict[str, Part]:
    """The parts by round, role and kind, as `1/solver/weights`."""
    return {
        "/".join(filter(None, [str(p.origin.round or ""), p.origin.role, p.kind])): p for p in inventory(settings, busy)
    }


def going(settings: Settings) -> list[str]:
    return sorted(name for name, part in what(settings).items() if not part.stays)


def test_of_an_unfinished_training_all_goes_but_the_newest_complete_checkpoint_and_the_log(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    begin(paths)
    checkpoint(paths, 3, complete=False)
    assert going(settings) == ["1/proposer/checkpoint 1", "1/proposer/checkpoint 3"]
    parts = what(settings)
    assert parts["1/proposer/checkpoint 2"].stays == NEWEST
    assert parts["1/proposer/log"].stays == UNFINISHED


def test_a_finished_training_keeps_its_checkpoint_until_its_weights_are_published(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    begin(paths)
    training = make(paths.training, seeds="s", base_weights="b")
    assert what(settings)["1/proposer/checkpoint 2"].stays == NEWEST
    make(paths.weights, training="of other settings")
    assert what(settings)["1/proposer/checkpoint 2"].stays == NEWEST
    make(paths.weights, training=training)
    assert going(settings) == ["1/proposer/checkpoint 1", "1/proposer/checkpoint 2", "1/proposer/log"]


def test_published_weights_of_other_settings_do_not_free_a_training_that_runs_anew(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    begin(paths)
    end(paths)
    write_atomically(paths.work / "state.json", json.dumps({"key": "of changed settings"}))
    assert what(settings)["1/proposer/checkpoint 2"].stays == NEWEST


def test_the_last_good_ones_stay_and_their_hard_links_count_once(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    begin(paths)
    shutil.copytree(paths.checkpoints / "global_step_1", paths.good / "global_step_1", copy_function=os.link)
    make(paths.last_good, {"model.safetensors": MB})
    parts = what(settings)
    assert parts["1/proposer/good"].stays == parts["1/proposer/last_good"].stays == LAST_GOOD
    assert not parts["1/proposer/checkpoint 1"].stays
    assert choose(parts.values(), Wanted(either=100 * MB)) == []  # its files would stay under their other names
    scratch = [part for part in parts.values() if part.origin.place == "scratch"]
    assert 4 * MB < total(scratch) < 4 * MB + 1000


def test_nothing_of_a_run_that_is_driven_may_go(settings: Settings) -> None:
    begin(paths_in(settings, 1, "proposer"))
    (paths_in(settings, 1, "proposer").kept / ".weights.building").mkdir(parents=True)
    lock = settings.storage.data_dir / "runs" / "demo" / ".driver.lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for hold in (False, True):
            with driven(settings, hold=hold) as busy:
                assert busy == {"demo"}
        parts = what(settings, frozenset({"demo"}))
        assert {part.stays for name, part in parts.items() if part.kind != "notes"} == {BUSY}
    with driven(settings, hold=False) as busy:
        assert busy == set()
    with driven(settings, hold=True) as busy, lock.open("w") as stream:
        assert busy == set()
        with pytest.raises(BlockingIOError):  # no driver starts while files go
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_journals_go_once_their_artifact_is_published(settings: Settings) -> None:
    proposer, solver = paths_in(settings, 1, "proposer"), paths_in(settings, 1, "solver")
    exams = solver.work.parents[1] / "exams" / "key"
    for folder in (proposer.candidates, exams):
        write_atomically(folder / "state.json", json.dumps({"key": hash_json([{"steps": 3}, {"seeds": "s"}])}))
    assert {what(settings)[name].stays for name in ("1/questions", "exams")} == {JOURNAL}
    make(proposer.questions, seeds="others")
    make(solver.evaluation)
    assert going(settings) == ["exams"]
    make(proposer.questions, seeds="s")
    stays = {part.kind: part.stays for part in inventory(settings, ()) if part.origin.place == "scratch"}
    assert stays == {"exams": "", "questions": ""}


def two_rounds(settings: Settings) -> None:
    """Both rounds of a run, each role going on from its round before."""
    first = {role: end(paths_in(settings, 1, role)) for role in ("proposer", "solver")}
    make(paths_in(settings, 1, "proposer").questions, proposer=first["proposer"])
    make(paths_in(settings, 1, "solver").evaluation, solver=first["solver"])
    end(paths_in(settings, 2, "proposer"), base_weights=first["proposer"], solver_weights=first["solver"])
    make(paths_in(settings, 2, "proposer").questions, solver=first["solver"])
    end(paths_in(settings, 2, "solver"), base_weights=first["solver"])


def test_weights_may_go_once_the_next_rounds_are_published(settings: Settings) -> None:
    two_rounds(settings)
    assert going(settings) == ["1/proposer/weights", "1/solver/weights"]
    for role in ("proposer", "solver"):
        (paths_in(settings, 2, role).weights / "change.json").unlink()
    assert going(settings) == []


@pytest.mark.parametrize(
    ("role", "missing"),
    [
        ("proposer", ("proposer", 2, "weights")),
        ("proposer", ("proposer", 2, "training")),
        ("proposer", ("proposer", 1, "questions")),
        ("solver", ("solver", 2, "weights")),
        ("solver", ("solver", 2, "training")),
        ("solver", ("proposer", 2, "training")),
        ("solver", ("solver", 1, "evaluation")),
        ("solver", ("proposer", 2, "questions")),
    ],
)
def test_weights_stay_while_something_that_is_made_from_them_is_missing_or_made_from_others(
    settings: Settings, role: str, missing: tuple[Role, int, str]
) -> None:
    two_rounds(settings)
    maker, number, name = missing
    artifact: Path = getattr(paths_in(settings, number, maker), name)
    names = ("training", "base_weights", "solver_weights", "solver", "proposer")
    make(artifact, {}, **dict.fromkeys(names, "others"))
    assert f"1/{role}/weights" not in going(settings)
    artifact.unlink()
    assert f"1/{role}/weights" not in going(settings)


def test_freed_weights_are_still_what_the_next_round_was_made_from_but_are_never_served(settings: Settings) -> None:
    two_rounds(settings)
    own = paths_in(settings, 1, "solver")
    before, used = read_manifest(own.weights), kept_bytes(settings)
    part = what(settings)["1/solver/weights"]
    free(part)
    assert used - kept_bytes(settings) == freed([part]) == 3 * MB
    assert read_manifest(own.weights).identity == before.identity
    assert stale_reason(own.weights, settings=before.settings, made_from=before.made_from) is None
    assert (own.weights / "change.json").stat().st_size == 100
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        checked_weights(str(own.weights))
    assert what(settings)["1/solver/weights"].stays == FREED
    assert going(settings) == ["1/proposer/weights"]


def test_weights_that_are_served_or_named_stay(settings: Settings) -> None:
    two_rounds(settings)
    solver, proposer = (paths_in(settings, 1, role).weights for role in ("solver", "proposer"))
    note_served(settings, str(solver.resolve()))
    assert going(settings) == ["1/proposer/weights"]
    assert what(settings)["1/solver/weights"].stays == NAMED
    note_path(settings).unlink()
    assert going(changed(settings, {"trainer.actor.model": str(proposer)})) == ["1/solver/weights"]


def test_half_written_and_half_deleted_folders_of_a_run_may_go(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    end(paths)
    for folder in (paths.kept / ".weights.building", paths.checkpoints / ".global_step_1.going"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * MB)
    names = going(settings)
    assert names == ["1/proposer/leftover .global_step_1.going", "1/proposer/leftover .weights.building"]
    for name in names:
        free(what(settings)[name])
    assert going(settings) == []
    assert read_manifest(paths.weights, verify=True)


def test_all_that_may_go_is_freed_byte_for_byte_and_all_else_is_left(settings: Settings) -> None:
    two_rounds(settings)
    for number in (1, 2, 3):
        begin(paths_in(settings, number, "proposer"))
    make(settings.storage.data_dir / "corpus")
    (settings.storage.scratch_dir / "logs").mkdir()
    (settings.storage.scratch_dir / "logs" / "solver.log").write_text("words")
    kept = {part.path: part.files for part in inventory(settings, ()) if part.stays}
    folders = [settings.storage.data_dir, settings.storage.scratch_dir]
    before = sum(inode.size for inode in scan(folders)[0])
    chosen = choose(inventory(settings, ()), Wanted(either=10**12))
    assert {part.origin.place for part in chosen} == {"kept", "scratch"}
    for part in chosen:
        free(part)
    assert before - sum(inode.size for inode in scan(folders)[0]) == freed(chosen) > 0
    after = {part.path: part.files for part in inventory(settings, ())}
    assert kept.items() <= after.items()
    assert going(settings) == []


def test_the_parts_add_up_to_all_files(settings: Settings) -> None:
    two_rounds(settings)
    begin(paths_in(settings, 1, "proposer"))
    note_served(settings, "any")
    make(settings.storage.data_dir / "corpus")
    folders = [settings.storage.data_dir, settings.storage.scratch_dir]
    # A lock is an empty file and no part of anything.
    assert total(inventory(settings, ())) == sum(inode.size for inode in scan(folders)[0])


# --- the budget


def test_a_budget_is_refused_with_expected_found_and_remedy_only_when_it_is_exceeded(settings: Settings) -> None:
    make(settings.storage.data_dir / "corpus", {"shard.parquet": 3 * MB})
    require_budget(settings)  # 0: no limit
    require_budget(changed(settings, {"storage.budget_gb": 0.01}))
    expected = r"take 3\.0 MB, .*BUDGET_GB = 0\.001; `python -m services.trainer.storage --prune`"
    with pytest.raises(ArtifactError, match=expected):
        require_budget(changed(settings, {"storage.budget_gb": 0.001}))


def test_over_budget_superseded_weights_go_and_scratch_stays(settings: Settings) -> None:
    two_rounds(settings)
    begin(paths_in(settings, 1, "proposer"))
    tight = changed(settings, {"storage.budget_gb": (kept_bytes(settings) - 2 * MB) / 1e9})
    parts = inventory(tight, ())
    wanted = needed(tight, parts)
    assert wanted == Wanted(kept=2 * MB)
    chosen = choose(parts, wanted)
    assert [part.kind for part in chosen] == ["weights"]
    require_enough(chosen, wanted)
    far = Wanted(kept=10 * MB)
    with pytest.raises(UsageError, match=r"expected 10\.0 MB of kept files that may go, found 6\.0 MB"):
        require_enough(choose(parts, far), far)


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "DRZERO_STORAGE__DATA_DIR": str(settings.storage.data_dir),
        "DRZERO_STORAGE__SCRATCH_DIR": str(settings.storage.scratch_dir),
        "DRZERO_STORAGE__MIN_FREE_GB": "0",
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("DRZERO_")}
    return subprocess.run(
        [sys.executable, "-m", "services.trainer.storage", *arguments],
        cwd=ROOT, env=own | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_lists_then_says_what_goes_and_frees_it_only_with_yes(settings: Settings) -> None:
    paths = paths_in(settings, 1, "proposer")
    begin(paths)
    end(paths)
    shown = command(settings)
    assert shown.returncode == 0
    assert "checkpoint 1" in shown.stdout
    assert "budget 15 GB" in shown.stdout
    answer = json.loads(command(settings, "--json", "--prune", "0.001").stdout)
    assert answer["goes_bytes"] >= 2 * MB
    assert answer["goes"] == [str(paths.log), str(paths.checkpoints / "global_step_1")]
    assert sum(part["bytes"] for part in answer["parts"]) == answer["kept_bytes"] + answer["scratch_bytes"]
    assert (paths.checkpoints / "global_step_1").is_dir()
    done = command(settings, "--prune", "0.001", "--yes")
    assert done.returncode == 0
    assert sorted(path.name for path in paths.checkpoints.iterdir()) == ["global_step_2"]
    assert "nothing has to go" in command(settings, "--prune").stdout
    too_much = command(settings, "--prune", "1")
    assert too_much.returncode == 1
    assert "expected 1.0 GB of files that may go, found 2.0 MB" in too_much.stderr
    assert command(settings, "--yes").returncode == 2


# --- the estimate


def test_one_round_of_a100x1_fits_fifteen_gb_as_it_is_served_and_not_as_it_is_trained() -> None:
    profile = build_settings({"DRZERO_PROFILE": "a100x1"})
    assert profile.trainer.actor.model == "Qwen/Qwen2.5-3B-Instruct"
    assert profile.trainer.actor.rollout_dtype == "bfloat16"
    served, trained = estimate(profile), estimate(changed(profile, {"trainer.actor.rollout_dtype": "auto"}))
    assert served is not None
    assert trained is not None
    assert served.weights == pytest.approx(6.2, abs=0.05)
    assert trained.weights == pytest.approx(12.4, abs=0.1)
    assert served.small(1) < 1.0
    assert served.kept(1) < 15.0 < served.pruned(2) < 20.0
    assert 15.0 < trained.kept(1) < 26.0


@pytest.mark.parametrize("name", profiles())
def test_a_run_of_a_shipped_profile_fits_its_budget_with_nothing_freed(name: str) -> None:
    profile = build_settings({"DRZERO_PROFILE": name})
    expected = estimate(profile)
    assert expected is not None
    assert expected.kept(profile.trainer.iterations) < profile.storage.budget_gb
    with capture_logs() as said:
        warn_of_budget(profile, structlog.get_logger())
        warn_of_budget(changed(profile, {"storage.budget_gb": 0.1}), structlog.get_logger())
    assert [line["budget_gb"] for line in said] == [0.1]


def test_the_table_of_the_documentation_is_what_the_estimate_says() -> None:
    expected = estimate(build_settings({"DRZERO_PROFILE": "a100x1"}))
    assert expected is not None
    table = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    assert f"| all | {expected.kept(1):.1f} | {expected.kept(3):.1f} |" in table
    assert f"at the fullest moment | {expected.pruned(1):.1f} | {expected.pruned(3):.1f} |" in table


def test_the_estimate_of_the_demo_is_what_its_run_was_measured_to_keep() -> None:
    expected = estimate(build_settings({}))
    assert expected is not None
    assert 1.446 < expected.kept(1) < 1.6  # GB: the sum of all files after `make demo`


def test_more_rounds_cost_two_models_each_or_with_superseded_ones_freed_one_more_at_once() -> None:
    expected = estimate(build_settings({"DRZERO_PROFILE": "rtx24"}))
    assert expected is not None
    each = sum(expected.each_round.values())
    assert expected.kept(2) - expected.kept(1) == pytest.approx(2 * expected.weights + each)
    assert expected.kept(1) == expected.pruned(1)
    assert expected.pruned(2) - expected.pruned(1) == pytest.approx(expected.weights + each)
    assert expected.pruned(5) - expected.pruned(2) == pytest.approx(3 * each)
