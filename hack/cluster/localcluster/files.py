"""Write files so that a reader sees the old content or the new, never a half."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


def write_json(path: Path, value: object, *, mode: int = 0o644) -> None:
    """Write a value as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n", mode=mode)
