"""A solver that answers at once: a training against it shows what a step takes without the reward's generation.

Run from the repository's root: `PYTHONPATH=. python tests/instant_solver.py 8031`, and give the trainer
`DRZERO_SOLVER__URL=http://127.0.0.1:8031`. Every attempt is over in one turn, with an answer that is wrong.
"""

import sys
from http.server import BaseHTTPRequestHandler

from model_services import Fault, Handler, Service, chat_reply


class InstantSolver(Handler, BaseHTTPRequestHandler):
    """Healthy, and quick with its answers."""

    def do_GET(self) -> None:
        self.play(Fault(body=b'{"data": [{"id": "solver"}]}'))


def main(port: int) -> None:
    """Serve until killed."""
    answer = chat_reply("<answer>none of them</answer>")
    Service(lambda path, body: answer, port=port, handler=InstantSolver).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
