"""Whether a training goes on and learns, where its time goes, and what is lost.

Rates of the trainer's counters are over ten minutes, because a step takes minutes.
"""

from monitoring.panels import Dashboard, Row, curves, number, shares, verl

TRAINING = Dashboard(
    "training",
    "Dr. Zero training",
    [
        Row(
            "Now",
            [
                number("Stage", "drzero_trainer_stage == 1", legend="{{stage}}"),
                number("Round", "drzero_trainer_round"),
                number("Step", "drzero_trainer_step"),
                number("Steps planned", "drzero_trainer_planned_steps"),
                number("Left of this training", "drzero:eta:seconds", "s", about="At the speed of the last step."),
                number("Since the last step", "drzero:idle:seconds", "s"),
                number("Alarms", "sum(drzero_trainer_alarm_steps > bool 0)", about="docs/algorithm.md, guards"),
                number("Waits for a service", "drzero_trainer_waiting"),
                number("Since a checkpoint", "drzero:checkpoint_age:seconds", "s"),
                number("Steps of the run", "drzero_trainer_steps_total"),
                number("Tokens of the run", "drzero_trainer_tokens_total"),
                number("Cost so far", "drzero_trainer_run_cost", about="By trainer.price_per_hour; 0: not set."),
            ],
        ),
        Row(
            "Does it learn",
            [
                curves(
                    "Reward",
                    ('drzero_trainer_reward_mean{part="score"}', "mean"),
                    ('drzero_trainer_reward_max{part="score"}', "max"),
                    about="Of the valid rollouts of a step.",
                ),
                verl("Entropy", "actor/entropy", about="Mean of the tokens, in nats. A collapse ends the training."),
                verl("Gradient norm", "actor/grad_norm", about="Before clipping."),
                curves(
                    "Policy against rollout engine",
                    ('drzero_trainer_mismatch{measure=~"kl|k3_kl"}', "{{measure}}"),
                    about="KL in nats; 0 is equal. A rise means that the engine draws from other weights or precision.",
                ),
                verl("Length of responses", "response_length/(mean|max)", about="Tokens, tool results among them."),
                verl("Loss", "actor/(pg_loss|loss)"),
                verl("Learning rate", "actor/lr"),
                verl("Advantages", "critic/advantages/(min|mean|max)"),
                verl("Groups without variance", "drzero/groups(_flat|_small)?", about="Flat groups teach nothing."),
            ],
        ),
        Row(
            "Where the time goes",
            [
                curves(
                    "Step by part",
                    ('drzero_trainer_step_seconds{part!="validation"}', "{{part}}"),
                    unit="s",
                    stacked=True,
                    width=12,
                ),
                curves(
                    "Tokens per second",
                    ("rate(drzero_trainer_tokens_total[10m])", "all"),
                    ('drzero_trainer_verl{name="perf/throughput"}', "while a step runs, per device"),
                    width=12,
                ),
                curves(
                    "Rollouts: 95th percentile",
                    ('drzero_trainer_work_seconds{at="p95"}', "{{work}}"),
                    unit="s",
                    about="Of a rollout: generation, searches. Of its question: an attempt, all attempts.",
                ),
                curves("Waiting for the last verdict", ("drzero_trainer_reward_tail_seconds", "tail"), unit="s"),
                curves("Validation", ('drzero_trainer_step_seconds{part="validation"}', "validation"), unit="s"),
            ],
        ),
        Row(
            "What is lost",
            [
                shares("Lost rollouts", "invalid", "Above trainer.max_invalid_share a step is refused."),
                curves(
                    "Lost, refused, in ten minutes",
                    (
                        "sum by (reason) (increase(drzero_trainer_invalid_rollouts_total[10m])) or vector(0)",
                        "rollouts: {{reason}}",
                    ),
                    ("increase(drzero_trainer_refused_steps_total[10m])", "refused steps"),
                ),
                curves("Alarms, steps in a row", ("drzero_trainer_alarm_steps", "{{alarm}}")),
            ],
        ),
        Row("Services", [curves("Answers", ("up", "{{job}}"), most=1, width=24)]),
    ],
)
