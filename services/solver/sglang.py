"""The command line of SGLang's server, from typed settings. Pure; SGLang itself is not imported here."""

from shared.settings import SolverSettings

MEMORY_SHARE = 0.9  # of the free memory; the rest is for CUDA graphs and forward passes


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
        # The pool by tokens, not by a share of what happens to be free: so neither the order in which services start
        # nor a restart beside a running trainer changes it. The share only bounds it.
        "--max-total-tokens": solver.kv_tokens,
        "--mem-fraction-static": MEMORY_SHARE,
        "--tp-size": solver.sglang.tp_size,
        "--dp-size": solver.sglang.dp_size,
        "--cuda-graph-max-bs": solver.cuda_graph_max_bs,
        "--chunked-prefill-size": solver.sglang.chunked_prefill_tokens,
        "--attention-backend": solver.sglang.attention_backend,
        "--sampling-backend": solver.sglang.sampling_backend,
    }
    words = ["-m", "services.solver.sglang_server"]
    for name, value in flags.items():
        words += [name, str(value)]
    # Graphs of prompt passes take a dozen seconds to capture, and prompts here are long enough to do without.
    return [*words, "--disable-piecewise-cuda-graph", "--enable-metrics"]
