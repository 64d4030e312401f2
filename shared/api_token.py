"""The one token that guards what changes or costs something: the variable `API_TOKEN`, a secret and so no setting.

Without it, what it guards is switched off. It is compared in constant time, never logged, and not handed on to the
processes of a training. A short one could be guessed and is refused.
"""

import hmac
from collections.abc import Mapping

from pydantic import SecretStr

from shared.command import UsageError

TOKEN = "API_TOKEN"  # noqa: S105  # a name
SHORTEST = 16


def api_token(environ: Mapping[str, str]) -> SecretStr | None:
    """The token of this environment, None when there is none (or an empty one); UsageError when it is too short."""
    text = environ.get(TOKEN, "")
    if 0 < len(text) < SHORTEST:
        raise UsageError(
            f"{TOKEN} has {len(text)} characters, expected at least {SHORTEST}; openssl rand -hex 24 makes one"
        )
    return SecretStr(text) if text else None


def is_token(given: str, token: SecretStr) -> bool:
    """Whether that is the token; takes as long for a wrong one as for the right one."""
    return hmac.compare_digest(
        given.encode(errors="surrogatepass"), token.get_secret_value().encode(errors="surrogatepass")
    )
