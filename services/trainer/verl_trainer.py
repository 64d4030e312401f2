"""verl's synchronous trainer with what self-play needs: hops in the advantage, lost rollouts out of the update.

Registered as `trainer.v1.trainer_mode=drzero`. Five things differ from verl's own class:

- Advantages come from `advantage.py`, with hop and validity of each rollout; invalid ones are masked out of the loss.
- Rewards are waited for when log-probabilities are there (`late_rewards.py`).
- A batch of which services lost more than `trainer.max_invalid_share` is refused before the weights see it: the trainer
  waits until search and solver are healthy, then rolls the same prompts out again, or has the same rollouts judged
  again where only the solver's attempts were lost. Rollouts that verl itself dropped count as lost.
- Between two steps a person may pause or stop it (`control.py`), with a checkpoint of the step before.
- What the advantage was made of is logged as `drzero/…` beside verl's metrics.
"""

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils
from verl.utils.debug import marked_timer

from services.trainer.advantage import flat_groups, grpo_advantages, hrpo_advantages
from services.trainer.control import heed, requested
from services.trainer.early_workers import EarlyWorkers, start_router
from services.trainer.late_rewards import LateRewards, Rollout
from services.trainer.outage import noting_outage
from services.trainer.paths import run_paths
from services.trainer.protocol import DEADLINE, TRAINER, hop_of
from services.trainer.records import Verdict, append_refusal
from services.trainer.serving import serve
from shared.balance import addresses_in
from shared.clients import Unavailable
from shared.files import write_atomically
from shared.settings import Settings, TrainerSettings, load_settings

PARTITION = "train"
PROBE_S = 1.0
POLL_S = 0.2  # between looks for the last rollout of a batch; verl's own 2 s are idle time of every step
NOTHING_CAME_BACK = "no materializable trajectories"  # in what verl raises when every rollout of a batch failed


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the advantage needs of a batch, one entry per row; padding rows of verl are not `real`."""

    rewards: list[float]
    hops: list[int]
    prompts: list[str]
    valid: list[bool]
    real: list[bool]


@register_trainer(TRAINER)
class SelfPlayTrainer(PPOTrainerSync):  # type: ignore[misc]
    """The proposer's trainer."""

    def _build_replay_buffer(self) -> "CheckedBuffer":
        self.trainer_mode = "sync"  # to verl's code this is the synchronous mode; only the class differs
        self._settings = load_settings()
        self._rewards = LateRewards(self._settings)
        self._asked = False  # whether somebody wanted something of this run when the last step ended
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_S
        return CheckedBuffer(buffer, self._again, self._settings)

    def init(self) -> None:
        """verl's own start, for which services may still be loading their models; over when they are ready too."""
        EarlyWorkers.start(self.config)
        start_router()
        super().init()
        wait_for_health(self._settings, "training is about to begin", patience=self._settings.trainer.start_patience_s)
        if self._settings.trainer.role == "proposer":
            with noting_outage():
                serve(self._settings, self._settings.solver.model, structlog.get_logger())

    def on_step_end(self) -> None:
        """When a pause or a stop is asked for, a checkpoint is saved where verl saves its own."""
        self._asked = requested(run_paths(self._settings).run) is not None
        if self._asked and "save_checkpoint" not in self.timing_raw:
            with marked_timer("save_checkpoint", self.timing_raw):
                self._save_checkpoint()
        super().on_step_end()

    def on_step_begin(self) -> None:
        """The step before is in verl's log now; what was asked for when it ended is done here."""
        if self._asked:
            began = time.monotonic()
            place = f"after step {self.global_steps - 1}"
            if heed(run_paths(self._settings).run, place, partial(tell, run_paths(self._settings).waiting)) == "stop":
                raise SystemExit(0)
            # verl's timer of the step runs already and adds its seconds to this.
            self.timing_raw["step"] = began - time.monotonic()
        super().on_step_begin()

    def on_validate_begin(self) -> None:
        """A validation is not repeated when services lose it, so it begins only when they are there."""
        wait_for_health(self._settings, "a validation is about to begin", patience=self._settings.trainer.patience_s)
        super().on_validate_begin()

    def on_sample_end(self) -> None:
        """The engine goes to sleep, which SGLang does only when nothing runs: what a deadline left behind is ended."""
        if self.replay_buffer.abandoned:
            self.checkpoint_manager.abort_replicas()
            self.checkpoint_manager.resume_generation_replicas()
            self.replay_buffer.abandoned = False
        super().on_sample_end()

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self._submitted = batch.copy()
        return int(super()._submit_batch_to_rollout(batch))

    def _again(self) -> None:
        """Roll the prompts of this step out once more."""
        self._submit_batch_to_rollout(self._submitted)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        with marked_timer("reward", self.timing_raw):
            metrics.update(self._settle_rewards(batch, already=int(metrics.get("drzero/refused", 0))))
        batch = super()._compute_advantage(batch, metrics)
        rollouts = read_rollouts(batch)
        advantages = batch_advantages(rollouts, self._settings.trainer)
        metrics.update(advantage_metrics(rollouts, advantages, self._settings.trainer))
        write_advantages(batch, advantages, rollouts.valid)
        return batch

    def _settle_rewards(self, batch: Any, *, already: int) -> dict[str, float]:
        """Put the rewards into a batch that has been refused `already` times, as soon as they are there."""
        trainer = self._settings.trainer
        rows = rollouts_of(batch)
        rollouts = dict(rows.values())
        verdicts = self._rewards.wait(rollouts)
        expected = trainer.prompts_per_step * trainer.rollouts_per_prompt
        refused = 0
        while True:
            write_rewards(batch, {row: verdicts[name] for row, (name, _) in rows.items()})
            reasons = Counter(v["invalid_reason"] for v in verdicts.values() if not v["valid"])
            share = 1 - sum(read_rollouts(batch).valid) / expected
            if may_train(share, trainer):
                return {"drzero/refused": already + refused, "drzero/invalid_share": share}
            refused += 1
            refuse(self._settings, self.global_steps, reasons, share, already + refused)
            verdicts = self._rewards.judge(rollouts)


class CheckedBuffer:
    """verl's replay buffer, but a training batch comes out only when enough of it was judged."""

    def __init__(self, inner: ReplayBuffer, again: Callable[[], None], settings: Settings) -> None:
        self._inner = inner
        self._again = again
        self.abandoned = False  # whether the engine may still generate for a rollout that a deadline has ended
        self._settings = settings

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """verl's `sample`; refuses and repeats a training batch as long as services lose too much of it."""
        trainer = self._settings.trainer
        refused = 0
        while True:
            try:
                batch, metrics = self._inner.sample(global_steps, partition_id, batch_size)
            except RuntimeError as error:
                if NOTHING_CAME_BACK not in str(error):
                    raise
                batch, metrics = None, {}
            if partition_id != PARTITION:
                return batch, metrics
            reasons = lost_rollouts(batch, expected=batch_size * trainer.rollouts_per_prompt)
            self.abandoned |= reasons[DEADLINE] > 0
            share = reasons.total() / (batch_size * trainer.rollouts_per_prompt)
            if may_train(share, trainer):
                return batch, metrics | {"drzero/refused": refused, "drzero/invalid_share": share}
            refused += 1
            refuse(self._settings, global_steps, reasons, share, refused)
            left = tq.kv_list(PARTITION) or {}
            tq.kv_clear(partition_id=PARTITION, keys=list(left.get(PARTITION, {})))
            self._again()


def lost_rollouts(batch: Any, *, expected: int) -> Counter[str]:
    """Rollouts of a batch that were lost while they were generated, by what they were lost to."""
    if batch is None:
        return Counter(failure=expected)
    extras = fetch(batch, "extra_fields")
    reasons = Counter(json.loads(extra["trajectory"])["lost"] for extra in extras if not reward_notes(extra)["valid"])
    return reasons + Counter(failure=max(0, expected - len(extras)))


def may_train(share: float, trainer: TrainerSettings) -> bool:
    """Whether a batch may be trained on of which `share` was lost."""
    # Without any judged rollout there is nothing to divide the loss by, whatever the settings allow.
    return share <= trainer.max_invalid_share and share < 1


def refuse(settings: Settings, step: int, reasons: Counter[str], share: float, refused: int) -> None:
    """Write down that a try of a step no longer counts, the `refused`th; returns when the services are healthy.

    Unavailable when it is one refusal too many, or when a service stays away.
    """
    why = ", ".join(f"{count} by {reason}" for reason, count in (+reasons).items())
    text = f"step {step} refused: {share:.0%} of its rollouts were lost ({why})"
    append_refusal(run_paths(settings).log, step=step, text=text)
    if refused > settings.trainer.max_refusals:
        with noting_outage():
            raise Unavailable("rollouts", f"{text}, {refused} times in a row")
    wait_for_health(settings, text, patience=settings.trainer.patience_s)


def tell(waiting: Path, text: str | None) -> None:
    """Write down why the trainer waits, or that it no longer does."""
    if text is None:
        waiting.unlink(missing_ok=True)
    else:
        write_atomically(waiting, json.dumps({"text": text}))


def wait_for_health(settings: Settings, reason: str, *, patience: float) -> None:
    """Return when search and solver answer; Unavailable when one has not within `patience` seconds.

    While it waits, `waiting.json` says why; a service that stays away is noted as an outage.
    """
    waiting = run_paths(settings).waiting
    give_up = time.monotonic() + patience
    probes = [("retrieval", settings.retrieval.url, "/ready")]
    if settings.trainer.role == "proposer":  # the solver's own training asks no other solver
        probes.append(("solver", settings.solver.url, "/health"))
    for service, urls, path in probes:
        asked = [f"{url}{path}" for url in addresses_in(urls)]
        places = " or ".join(asked)
        # Written before the question: a service that hangs takes its time to say nothing.
        tell(waiting, f"{reason}; waiting for {service} at {places}")
        while not any(map(answers, asked)):
            if time.monotonic() > give_up:
                with noting_outage():
                    raise Unavailable(service, f"{places} is not healthy after {patience:.0f} s ({reason})")
            time.sleep(PROBE_S)
    tell(waiting, None)


def answers(address: str) -> bool:
    """Whether a GET brings status 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def read_rollouts(batch: Any) -> Rollouts:
    """Reward, hop, prompt and validity of each row of a batch, from verl's transfer queue."""
    notes = [reward_notes(extra) for extra in fetch(batch, "extra_fields")]
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    return Rollouts(
        rewards=[float(note["score"]) for note in notes],
        hops=[hop_of(str(source)) for source in fetch(batch, "data_source")],
        prompts=[key.split("_")[0] for key in batch.keys],
        valid=[bool(note["valid"]) and ok for note, ok in zip(notes, real, strict=True)],
        real=real,
    )


def rollouts_of(batch: Any) -> dict[int, tuple[str, Rollout]]:
    """Name and rollout of each row that is no padding, by row."""
    extras, sources, infos = (fetch(batch, name) for name in ("extra_fields", "data_source", "extra_info"))
    found = {}
    for row, (extra, tag) in enumerate(zip(extras, batch.tags, strict=True)):
        if not tag.get("is_padding", False):
            trajectory = json.loads(extra["trajectory"])
            found[row] = (trajectory["rollout"], Rollout(str(sources[row]), trajectory, dict(infos[row])))
    return found


def write_rewards(batch: Any, verdicts: Mapping[int, Verdict]) -> None:
    """Give rows their rewards, at the last token as verl does, and their notes."""
    if not verdicts:
        return
    extras = fetch(batch, "extra_fields")
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    scores = [row.clone() for row in data["rm_scores"].unbind()]
    for row, verdict in verdicts.items():
        scores[row][-1] = verdict["score"]
        extras[row] = extras[row] | {"reward_extra_info": {name: float(verdict[name]) for name in ("score", "valid")}}
    nested = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
    fields = tensordict_utils.get_tensordict({"rm_scores": nested, "extra_fields": objects(extras)})
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def objects(values: Sequence[Any]) -> npt.NDArray[np.object_]:
    """An array of objects, which numpy would otherwise look into."""
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def fetch(batch: Any, field: str) -> list[Any]:
    """One non-tensor field of all rows of a batch."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[field])
    return list(data[field].tolist() if hasattr(data[field], "tolist") else data[field])


def reward_notes(extra: Any) -> dict[str, float]:
    """What `reward.compute_score` returned for a row."""
    return dict(extra["reward_extra_info"])


def batch_advantages(rollouts: Rollouts, trainer: TrainerSettings) -> list[float]:
    """One advantage per row, by the estimator of the settings."""
    if trainer.advantage == "grpo":
        return grpo_advantages(rollouts.rewards, rollouts.prompts, rollouts.valid)
    return hrpo_advantages(
        rollouts.rewards,
        rollouts.hops,
        rollouts.valid,
        small_group=trainer.small_group,
        small_group_rule=trainer.small_group_rule,
    )


def advantage_metrics(rollouts: Rollouts, advantages: Sequence[float], trainer: TrainerSettings) -> dict[str, float]:
    """Numbers about the groups of a step, for the log and the guards."""
    keys: Sequence[Any] = rollouts.prompts if trainer.advantage == "grpo" else rollouts.hops
    groups, flat = flat_groups(advantages, keys, rollouts.valid)
    sizes = Counter(hop for hop, ok in zip(rollouts.hops, rollouts.valid, strict=True) if ok)
    small = sum(size < trainer.small_group for size in sizes.values()) if trainer.advantage == "hrpo" else 0
    return {
        "drzero/groups": float(groups),
        "drzero/groups_flat": float(flat),
        "drzero/groups_small": float(small),
        "drzero/invalid": float(sum(rollouts.real) - sum(rollouts.valid)),
    }


def write_advantages(batch: Any, advantages: Sequence[float], valid: Sequence[bool]) -> None:
    """Give every token a row has sampled the row's advantage; mask invalid rows out of loss and token count."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
    fields = loss_fields(data["response_mask"], advantages, valid)
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch)))


def loss_fields(response_mask: Any, advantages: Sequence[float], valid: Sequence[bool]) -> dict[str, Any]:
    """What verl's loss reads, from the jagged mask of sampled tokens: advantages and the two masks it knows."""
    from verl.workers.utils.padding import response_to_nested

    mask = response_mask.to_padded_tensor(padding=0)
    kept = mask * torch.tensor(valid, dtype=mask.dtype)[:, None]
    per_token = kept.float() * torch.tensor(advantages, dtype=torch.float32)[:, None]
    # The policy loss sums over response_mask; the number of tokens it divides by comes from loss_mask.
    fields = {"advantages": per_token, "returns": per_token, "response_mask": kept, "loss_mask": kept}
    return {name: response_to_nested(value, response_mask) for name, value in fields.items()}
