"""GPUs, storage, containers and Redis."""

from monitoring.panels import RATE, Dashboard, Row, curves

HARDWARE = Dashboard(
    "hardware",
    "Dr. Zero GPU and storage",
    [
        Row(
            "GPUs",
            [
                curves("In use", ("DCGM_FI_DEV_GPU_UTIL", "{{gpu}}"), unit="percent", most=100),
                curves(
                    "Memory in use",
                    ("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)", "{{gpu}}"),
                    unit="percentunit",
                    most=1,
                ),
                curves("Memory being read or written", ("DCGM_FI_DEV_MEM_COPY_UTIL", "{{gpu}}"), unit="percent"),
                curves("Power", ("DCGM_FI_DEV_POWER_USAGE", "{{gpu}}"), unit="watt"),
                curves("Temperature", ("DCGM_FI_DEV_GPU_TEMP", "{{gpu}}"), unit="celsius"),
                curves("Clock", ("DCGM_FI_DEV_SM_CLOCK * 1e6", "{{gpu}}"), unit="hertz"),
                curves(
                    "Slowed down, errors",
                    ("drzero:gpu_slowed:bool", "{{gpu}} slowed"),
                    ("DCGM_FI_DEV_XID_ERRORS", "{{gpu}} XID"),
                ),
                curves(
                    "Energy in an hour",
                    ("sum(increase(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION[1h])) / 1000", "all cards"),
                    ("drzero_trainer_run_energy_joules", "the whole run"),
                    unit="joule",
                ),
            ],
        ),
        Row(
            "Storage",
            [
                curves(
                    "Kept files and scratch",
                    ("drzero_trainer_storage_bytes", "{{place}}"),
                    ("drzero_trainer_storage_budget_bytes", "budget of kept files"),
                    unit="bytes",
                ),
                curves(
                    "Free disk",
                    ("drzero_trainer_storage_free_bytes", "{{place}}"),
                    ("drzero_trainer_storage_min_free_bytes", "least"),
                    unit="bytes",
                ),
                curves(
                    "Age of the newest checkpoint",
                    ("drzero:checkpoint_age:seconds", "age"),
                    ("drzero_trainer_save_every_steps * drzero:step:seconds", "expected between two"),
                    unit="s",
                ),
            ],
        ),
        Row(
            "Containers",
            [
                curves(
                    "Memory", ("sum by (service) (container_memory_working_set_bytes)", "{{service}}"), unit="bytes"
                ),
                curves(
                    "Share of the memory limit",
                    (
                        "max by (service)"
                        " (container_memory_working_set_bytes / (container_spec_memory_limit_bytes > 0))",
                        "{{service}}",
                    ),
                    unit="percentunit",
                    most=1,
                ),
                curves(
                    "Cores in use",
                    (f"sum by (service) (rate(container_cpu_usage_seconds_total[{RATE}]))", "{{service}}"),
                ),
                curves(
                    "Network",
                    (f"sum by (service) (rate(container_network_receive_bytes_total[{RATE}]))", "to {{service}}"),
                    (f"sum by (service) (rate(container_network_transmit_bytes_total[{RATE}]))", "from {{service}}"),
                    unit="Bps",
                ),
                curves(
                    "Written to disk",
                    (f"sum by (service) (rate(container_fs_writes_bytes_total[{RATE}]))", "{{service}}"),
                    unit="Bps",
                ),
                curves(
                    "Started again in an hour",
                    ("max by (service) (changes(container_start_time_seconds[1h]))", "{{service}}"),
                ),
            ],
        ),
        Row(
            "Redis",
            [
                curves("Reachable", ("redis_up", "up"), most=1),
                curves(
                    "Memory",
                    ("redis_memory_used_bytes", "in use"),
                    unit="bytes",
                ),
                curves("Commands per second", (f"rate(redis_commands_processed_total[{RATE}])", "commands")),
                curves("Clients", ("redis_connected_clients", "clients")),
                curves("Keys", ("sum(redis_db_keys)", "keys")),
                curves(
                    "Keys found and not found",
                    (f"rate(redis_keyspace_hits_total[{RATE}])", "found"),
                    (f"rate(redis_keyspace_misses_total[{RATE}])", "not found"),
                ),
            ],
        ),
    ],
)
