"""`mili replay FILE`: make a recording's decisions again, with the scheduler that is installed.

Owns what is printed and the exit code. Does not know the format or how it is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mili.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from mili.router.replay import Difference


def replay(
    file: Annotated[Path, typer.Argument(help="What a router wrote on SIGUSR1 or a crash.")],
) -> int:
    """Make the decisions of a router's recording again, and say where they first differ.

    Exits 0 if all are the same, 1 if not.
    """
    from mili.router.recorder import read
    from mili.router.replay import replay as replay_reel

    same = True
    try:
        for replayed in map(replay_reel, read(file)):
            print(
                f"{replayed.group}: {replayed.calls} decisions, {replayed.commands} step commands:"
                f" {'DIFFERENT' if replayed.difference else 'all the same'}"
            )
            if replayed.difference:
                same = False
                print(_description(replayed.difference))
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    return ExitCode.CLEAN if same else ExitCode.CRASH


def _description(difference: Difference) -> str:
    return (
        f"  decision {difference.call}, {difference.name}\n"
        f"  recorded: {difference.recorded.strip()}\n"
        f"  replayed: {difference.replayed.strip()}"
    )
