"""What the reward is made of, by part and by hop, and what the questions and attempts are like."""

from monitoring.panels import Dashboard, Row, curves, parts, shares

REWARD = Dashboard(
    "reward",
    "Dr. Zero reward",
    [
        Row(
            "The reward and its parts",
            [
                parts("Reward, format, difficulty", "score|format|difficulty|bonus"),
                parts("Parts of the format", "format_.+", "docs/algorithm.md says what each is."),
                parts("Biomedical parts", "citations|genes|reasoning|novelty", "Paid only in that variant."),
                parts("The solver's own training", "exact_match|biomedical_match|answered"),
                curves("Reward by hop", ("drzero_trainer_hop_score_mean", "hop {{hop}}")),
                curves(
                    "Deviation by hop", ("drzero_trainer_hop_score_std", "hop {{hop}}"), about="HRPO divides by it."
                ),
            ],
        ),
        Row(
            "The questions",
            [
                curves(
                    "By number of right attempts",
                    ("drzero_trainer_solved_ratio", "{{right}} right"),
                    unit="percentunit",
                    stacked=True,
                    most=1,
                    about="A proposer that learns moves questions away from none and all.",
                ),
                shares("Solved sometimes, never, always", "solvable|never_solved|always_solved"),
                curves(
                    "What they ask for",
                    ("drzero_trainer_reasoning_ratio", "{{type}}"),
                    unit="percentunit",
                    stacked=True,
                    most=1,
                ),
                shares("Repeated, like an earlier one, copied", "repeated|duplicates|copied"),
                curves("Rollouts by hop", ("drzero_trainer_hop_rollouts", "hop {{hop}}"), stacked=True),
                curves(
                    "Rollouts and judged questions of a step",
                    ('drzero_trainer_step_count{of=~"rollouts|judged"}', "{{of}}"),
                ),
            ],
        ),
        Row(
            "Searches and attempts",
            [
                curves(
                    "Searches per minute",
                    ("60 * rate(drzero_trainer_searches_total[10m])", "all"),
                    ("60 * rate(drzero_trainer_failed_searches_total[10m])", "broken or without papers"),
                ),
                curves(
                    "Broken calls in ten minutes",
                    ("sum by (kind) (increase(drzero_trainer_broken_calls_total[10m])) or vector(0)", "{{kind}}"),
                ),
                curves(
                    "Attempts per minute by ending",
                    ("60 * sum by (ended) (rate(drzero_trainer_attempts_total[10m]))", "{{ended}}"),
                    stacked=True,
                ),
                curves(
                    "Time of an attempt",
                    (
                        "histogram_quantile(0.5, sum by (le) (rate(drzero_trainer_attempt_seconds_bucket[10m])))",
                        "p50",
                    ),
                    (
                        "histogram_quantile(0.95, sum by (le) (rate(drzero_trainer_attempt_seconds_bucket[10m])))",
                        "p95",
                    ),
                    unit="s",
                ),
            ],
        ),
    ],
)
