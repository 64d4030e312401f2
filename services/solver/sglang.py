"""The command line of SGLang's server, from typed settings. Pure; SGLang itself is not imported here."""

from shared.settings import SolverSettings


def sglang_command(solver: SolverSettings, folder: str) -> list[str]:
    """Arguments after the Python interpreter; `folder` is a Hugging Face folder or id."""
    flags: dict[str, str | int | float] = {
        "--model-path": folder,
        "--served-model-name": solver.served_name,
        "--host": solver.host,
        "--port": solver.port,
        "--dtype": solver.dtype,
        "--context-length": solver.context_tokens,
        "--max-running-requests": solver.max_running,
        "--max-queued-requests": solver.max_waiting,
        "--mem-fraction-static": solver.sglang.mem_fraction_static,
        "--tp-size": solver.sglang.tp_size,
        "--dp-size": solver.sglang.dp_size,
        "--cuda-graph-max-bs": solver.sglang.cuda_graph_max_bs,
        "--chunked-prefill-size": solver.sglang.chunked_prefill_tokens,
        "--attention-backend": solver.sglang.attention_backend,
        "--sampling-backend": solver.sglang.sampling_backend,
    }
    words = ["-m", "sglang.launch_server"]
    for name, value in flags.items():
        words += [name, str(value)]
    return [*words, "--enable-metrics"]
