"""Where the files of a run lie: one place for every path below `runs/<run>/<round>/<role>/`."""

from dataclasses import dataclass
from pathlib import Path

from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Paths of one role's part of a round; `kept` is in data, `work` in scratch."""

    kept: Path
    work: Path
    corpus: Path
    index: Path

    @property
    def seeds(self) -> Path:
        """Artifact: train.parquet and held_out.parquet; the proposer's has questions.parquet too."""
        return self.kept / "seeds"

    @property
    def training(self) -> Path:
        """Artifact: rollouts.jsonl, metrics.jsonl and held_out.jsonl of a finished training."""
        return self.kept / "training"

    @property
    def weights(self) -> Path:
        """Artifact: the trained model as plain Hugging Face files."""
        return self.kept / "weights"

    @property
    def questions(self) -> Path:
        """Artifact: questions.parquet, those of the round that were verified, and rejected.jsonl."""
        return self.kept.parent / "questions"

    @property
    def candidates(self) -> Path:
        """What questions.py has done so far: a journal in scratch."""
        return self.work.parent / "questions"

    @property
    def evaluation(self) -> Path:
        """Artifact: evaluation.json of the round."""
        return self.kept.parent / "evaluation"

    @property
    def report(self) -> Path:
        """Artifact: report.html of the round."""
        return self.kept.parent / "report"

    @property
    def run(self) -> Path:
        """The run's folder: its rounds, and the state of the driver."""
        return self.kept.parents[1]

    @property
    def checkpoints(self) -> Path:
        """verl's checkpoints: global_step_<n>/."""
        return self.work / "checkpoints"

    @property
    def good(self) -> Path:
        """A copy of the last checkpoint before the training went wrong, made at the first alarm."""
        return self.work / "good"

    @property
    def last_good(self) -> Path:
        """Artifact: weights of the last good checkpoint of a training that a guard has stopped."""
        return self.kept / "last_good"

    @property
    def log(self) -> Path:
        """What rollout and reward workers append while training runs, and verl's own log."""
        return self.work / "log"

    @property
    def tools_file(self) -> Path:
        """verl's list of tools."""
        return self.work / "tools.yaml"

    @property
    def agents_file(self) -> Path:
        """verl's list of agent loops."""
        return self.work / "agents.yaml"

    @property
    def outage(self) -> Path:
        """Written by a worker that gave up on a service; ends the training."""
        return self.work / "outage.json"

    @property
    def gate(self) -> Path:
        """Written when the format score becomes gated; read by reward workers."""
        return self.work / "gate.json"

    @property
    def waiting(self) -> Path:
        """Why verl's trainer waits and for what; gone when it goes on."""
        return self.work / "waiting.json"


def run_paths(settings: Settings) -> RunPaths:
    """The paths of the settings' run, round and role, all absolute."""
    trainer = settings.trainer
    place = Path(trainer.run) / str(trainer.round) / trainer.role
    data = settings.storage.data_dir.absolute()
    return RunPaths(
        kept=data / "runs" / place,
        work=settings.storage.scratch_dir.absolute() / "runs" / place,
        corpus=data / "corpus",
        index=data / "index",
    )
