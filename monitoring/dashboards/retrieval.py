"""The search service: how fast, how full, and which stage takes the time."""

from monitoring.panels import RATE, Dashboard, Row, curves, number, quantiles

RETRIEVAL = Dashboard(
    "retrieval",
    "Dr. Zero retrieval",
    [
        Row(
            "Now",
            [
                number("Papers", 'drzero_retrieval_corpus_records{count="kept"}'),
                number("Index", "drzero_retrieval_index_info", legend="{{version}}"),
                number("Vectors", "sum(drzero_retrieval_index_bytes)", "bytes"),
                number("Requests per second", f"sum(rate(drzero_retrieval_requests_total[{RATE}]))"),
                number(
                    "p99", "drzero:retrieval_request_seconds:p99", "s", about="Of /search and /retrieve, 5 minutes."
                ),
                number("Redis keeps results", "drzero_retrieval_cache_up"),
            ],
        ),
        Row(
            "Requests",
            [
                curves(
                    "By route and status",
                    (f"sum by (route, status) (rate(drzero_retrieval_requests_total[{RATE}]))", "{{route}} {{status}}"),
                    unit="reqps",
                ),
                quantiles(
                    "Time of a search", "drzero_retrieval_request_seconds", chosen='{route=~"/search|/retrieve"}'
                ),
                curves(
                    "Not answered",
                    (f"sum by (reason) (rate(drzero_retrieval_rejections_total[{RATE}]))", "{{reason}}"),
                    unit="reqps",
                ),
            ],
        ),
        Row(
            "Stages",
            [
                curves(
                    "Stages: mean time of a batch",
                    (
                        f"sum by (stage) (rate(drzero_retrieval_stage_seconds_sum[{RATE}]))"
                        f" / sum by (stage) (rate(drzero_retrieval_stage_seconds_count[{RATE}]))",
                        "{{stage}}",
                    ),
                    unit="s",
                ),
                curves(
                    "Share of a core's time",
                    (f"sum by (stage) (rate(drzero_retrieval_stage_seconds_sum[{RATE}]))", "{{stage}}"),
                    unit="percentunit",
                    stacked=True,
                ),
                curves(
                    "Queries of a batch",
                    (
                        f"sum(rate(drzero_retrieval_batch_queries_sum[{RATE}]))"
                        f" / sum(rate(drzero_retrieval_batch_queries_count[{RATE}]))",
                        "mean",
                    ),
                ),
                curves(
                    "Queue",
                    ("drzero_retrieval_queue_queries", "queries that wait"),
                    ("drzero_retrieval_queue_limit_queries", "most"),
                ),
                quantiles("Time in the queue", "drzero_retrieval_queue_seconds"),
                curves(
                    "Results kept in Redis",
                    (f"sum by (outcome) (rate(drzero_retrieval_cache_lookups_total[{RATE}]))", "{{outcome}}"),
                    stacked=True,
                ),
            ],
        ),
        Row(
            "Process",
            [
                curves("Memory", ('process_resident_memory_bytes{job="retrieval"}', "resident"), unit="bytes"),
                curves(
                    "Cores in use",
                    (f'rate(process_cpu_seconds_total{{job="retrieval"}}[{RATE}])', "cores"),
                ),
                curves(
                    "Indexes taken up in an hour",
                    ("increase(drzero_retrieval_reloads_total[1h])", "{{outcome}}"),
                ),
            ],
        ),
    ],
)
