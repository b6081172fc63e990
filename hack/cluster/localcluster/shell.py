"""Run a program to its end and turn a failure into a readable error."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from localcluster.errors import ClusterError

TAIL_LINES = 30


def run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Return the standard output of a program that must succeed."""
    result = try_run(command, stdin=stdin, cwd=cwd, env=env)
    if result.returncode != 0:
        raise ClusterError(f"{_shown(command)}: exit status {result.returncode}\n{tail(result.stdout + result.stderr)}")
    return result.stdout


def try_run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program that may fail and return its status and output."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, input=stdin, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError(f"{words[0]}: no such program on this machine") from error


def tail(text: str, *, num_lines: int = TAIL_LINES) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.splitlines()[-num_lines:])


def say(message: str) -> None:
    """Show one line of progress, apart from what a command prints for other programs."""
    print(message, file=sys.stderr, flush=True)


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(str(word) for word in command[:4])
