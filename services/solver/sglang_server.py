"""SGLang's server with the API token: `python -m services.solver.sglang_server FLAGS`, as `sglang.launch_server`.

SGLang takes a token as a flag, where every user of the machine can read it, and writes its flags to its log. Here it is
put among the flags after they are read, as a text that no log shows.
"""

import runpy

from shared.access import api_token


def main() -> None:
    """Run SGLang's own command, its flags completed by the token."""
    from sglang.srt import server_args

    read_flags = server_args.prepare_server_args

    def with_token(words: list[str]) -> server_args.ServerArgs:
        flags = read_flags(words)
        flags.api_key = api_token()
        return flags

    server_args.prepare_server_args = with_token
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
