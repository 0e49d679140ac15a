"""`mili http`: OpenAI's HTTP API in front of a router.

Owns what a user is told who lacks the packages. The API itself is mili.client.http.
"""

from __future__ import annotations

from mili.cli.errors import CommandError
from mili.cli.http_config import HttpConfig


def run_front(config: HttpConfig) -> int:
    """Serve until a signal; return the exit code. Raises CommandError without the packages."""
    check_packages()
    from mili.client.http.server import run

    return run(config.address, config.http_host, config.http_port, config.drain_timeout)


def check_packages() -> None:
    """Raises CommandError where the packages of the extra are missing."""
    try:
        import mili.client.http.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the HTTP API needs the package {error.name}: pip install 'mili[http]'"
        ) from None
