"""The environment: the only reader of its variables, and what child processes inherit of it."""

import os
from pathlib import Path


def cache_home() -> Path:
    """Return the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # noqa: TID251  # the one place


def child_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a child process: this one's, and a few variables more."""
    return {**os.environ, **variables}  # noqa: TID251  # the one place
