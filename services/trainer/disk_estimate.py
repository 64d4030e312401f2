"""How much the kept files of a run will take, from its settings: arithmetic that leans to the large side.

    all = corpus + index + models + rounds × (seeds, training, questions, evaluation, report) + models' weights

Weights are most of it: each round keeps two, the proposer's and the solver's, in the precision that they are served in.
Where superseded ones are freed (`disk_parts.py`), the newest two stay; but a round's are published while those that
they were trained from still stand: three at once.

Bytes of papers and rollouts were counted on this project's own runs. GB are 10⁹ bytes, as disks count them.
"""

from dataclasses import dataclass

from shared.model_files import PACKAGE
from shared.model_shapes import Shape, model_shape
from shared.settings import Settings, TrainerSettings

PAPER = 1500  # bytes of a paper in the corpus, compressed; 700 counted
PAPER_INDEX = 1000  # of a paper in the index besides its vector: words and filters 250, the graph of hnsw 530
TOKEN = 5  # of a token of text; 4 to 4.5 in English
ROW = 4000  # of a rollout, a seed or a question besides its turns; 1,200 counted
PAGE_GB = 0.02  # the report
SET_QUESTIONS = 1000  # of an evaluation set that names no limit, as many as PubMedQA has
SAFETY_PROMPTS = 25  # of safety_prompts.jsonl
TOKENIZER_GB = 0.02
VALUE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """GB of the kept files by what they are."""

    once: dict[str, float]
    each_round: dict[str, float]
    weights: float  # of one model

    def kept(self, rounds: int) -> float:
        """GB after so many rounds."""
        return self.small(rounds) + self.weights * 2 * rounds

    def pruned(self, rounds: int) -> float:
        """GB at the fullest moment of so many rounds when superseded weights are freed as soon as they may be."""
        return self.small(rounds) + self.weights * (2 if rounds == 1 else 3)

    def small(self, rounds: int) -> float:
        """GB of everything but weights."""
        return sum(self.once.values()) + rounds * sum(self.each_round.values())


def estimate(settings: Settings) -> Estimate | None:
    """What the kept files of these settings will take; None while a model's shape is unknown."""
    trainer = settings.trainer
    actor, encoder = model_shape(trainer.actor.model), model_shape(settings.retrieval.encoder.model)
    if actor is None or encoder is None:
        return None
    stored = trainer.actor.master_dtype if trainer.actor.rollout_dtype == "auto" else trainer.actor.rollout_dtype
    return Estimate(
        once=once_gb(settings, actor, encoder),
        each_round=round_gb(trainer),
        weights=actor.parameters * VALUE[stored] / 1e9 + TOKENIZER_GB,
    )


def once_gb(settings: Settings, actor: Shape, encoder: Shape) -> dict[str, float]:
    """Corpus, index and unpacked models."""
    papers = settings.ingest.max_records
    on_card = settings.retrieval.encoder.device.startswith("cuda")
    encoder_bytes = 0 if on_card else encoder.parameters * 4  # OpenVINO's copy of the encoder
    unpacked = settings.trainer.actor.model.startswith(PACKAGE)
    return {
        "corpus": papers * PAPER / 1e9,
        "index": (papers * (encoder.hidden * 4 + PAPER_INDEX) + encoder_bytes) / 1e9,
        "models": actor.parameters * 2 / 1e9 if unpacked else 0.0,
    }


def round_gb(trainer: TrainerSettings) -> dict[str, float]:
    """What one round adds besides weights."""
    reward, questions, own = trainer.reward, trainer.questions, trainer.solver
    answer = reward.max_turns * (reward.max_new_tokens + reward.max_tool_tokens)  # tokens, search results among them
    proposed = trainer.steps * trainer.prompts_per_step * trainer.rollouts_per_prompt + 2 * trainer.eval_seeds
    solved = own.steps * own.prompts_per_step * own.rollouts_per_prompt + 2 * own.eval_questions
    candidates = questions.papers * questions.candidates
    papers = trainer.seeds + trainer.eval_seeds + questions.papers
    asked = trainer.evaluation.most or SET_QUESTIONS
    exams = 2 * (
        len(trainer.evaluation.sets) * asked
        + round(candidates * questions.held_out_share) * trainer.iterations
        + (SAFETY_PROMPTS if trainer.evaluation.safety else 0)
    )
    return {
        "seeds": (papers + candidates) * (trainer.prompt_tokens * TOKEN + ROW) / 1e9,
        "proposer's training": proposed * (trainer.response_tokens * TOKEN + ROW) / 1e9,
        "solver's training": solved * (answer * TOKEN + ROW) / 1e9,
        "questions": candidates * ROW / 1e9,
        "evaluation": exams * (answer * TOKEN + ROW) / 1e9,
        "report": PAGE_GB,
    }
