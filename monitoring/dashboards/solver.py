"""The solver, as SGLang on GPUs or as our engine on a CPU: one of the two rows is empty."""

from monitoring.panels import RATE, Dashboard, Row, curves, quantiles

SOLVER = Dashboard(
    "solver",
    "Dr. Zero solver",
    [
        Row(
            "SGLang, on GPUs",
            [
                curves(
                    "Requests",
                    ("sum(sglang:num_running_reqs)", "running"),
                    ("sum(sglang:num_queue_reqs)", "waiting"),
                ),
                curves("KV pool in use", ("max by (job) (sglang:token_usage)", "share"), unit="percentunit", most=1),
                curves("Tokens generated per second", ("sum(sglang:gen_throughput)", "all copies")),
                quantiles("Time to the first token", "sglang:time_to_first_token_seconds"),
                quantiles("Time between tokens", "sglang:inter_token_latency_seconds"),
                quantiles("Time of a request", "sglang:e2e_request_latency_seconds"),
                curves("Prompt tokens from the cache", ("avg(sglang:cache_hit_rate)", "share"), unit="percentunit"),
                curves(
                    "Tokens per second by kind",
                    (f"sum(rate(sglang:prompt_tokens_total[{RATE}]))", "prompt"),
                    (f"sum(rate(sglang:generation_tokens_total[{RATE}]))", "new"),
                ),
                curves(
                    "Aborted and taken back",
                    (f"sum(rate(sglang:num_aborted_requests_total[{RATE}]))", "aborted a second"),
                    ("sum(sglang:num_retracted_reqs)", "taken back for room"),
                ),
            ],
        ),
        Row(
            "transformers, on a CPU",
            [
                curves(
                    "By route and status",
                    (f"sum by (route, status) (rate(drzero_solver_requests_total[{RATE}]))", "{{route}} {{status}}"),
                    unit="reqps",
                ),
                quantiles("Time of a request (CPU)", "drzero_solver_request_seconds"),
                curves(
                    "Running or waiting",
                    ("drzero_solver_pending_requests", "requests"),
                    ("drzero_solver_pending_limit_requests", "most"),
                ),
                curves(
                    "Tokens per second (CPU)",
                    (f"sum by (kind) (rate(drzero_solver_tokens_total[{RATE}]))", "{{kind}}"),
                ),
                curves("Weights changed", ("drzero_solver_weight_updates_total", "{{outcome}}")),
                curves("Memory", ('process_resident_memory_bytes{job="solver"}', "resident"), unit="bytes"),
            ],
        ),
    ],
)
