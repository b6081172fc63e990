"""Where checkpoints are kept: a folder, or a prefix in an object store. What is written as a whole appears as a whole."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from finetune_trainer.durable import sync_folder, write_file

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_TEMPORARY = ".tmp-"
_CONNECT_SECONDS, _READ_SECONDS = 5, 30


class Storage(Protocol):
    """Folders of files by name; what goes wrong is raised as OSError."""

    is_remote: ClassVar[bool]
    """Whether trouble is probably that of a network, which a later attempt may not meet."""

    def list_folders(self) -> list[str]:
        """Return the names of the folders, without those that are being written."""

    def write_folder(self, name: str, files: Mapping[str, bytes], *, confirm: Callable[[], None]) -> None:
        """Write a folder durably, the last of `files` last, and ask `confirm` before it becomes visible; all or nothing."""

    def read(self, path: str) -> bytes:
        """Return the content of a file."""

    def write(self, path: str, content: bytes) -> None:
        """Write a single file durably."""

    def rename_folder(self, name: str, new_name: str) -> None:
        """Give a folder another name."""

    def remove_folder(self, name: str) -> None:
        """Remove a folder so that it is never taken for a whole one."""

    def clean(self) -> None:
        """Remove what an interrupted process left half-written."""


def open_storage(location: str) -> Storage:
    """Return the storage at a path, or at an s3:// URL."""
    return ObjectStorage(location) if "://" in location else FolderStorage(Path(location))


class FolderStorage:
    """Folders on a file system."""

    is_remote: ClassVar[bool] = False

    def __init__(self, root: Path) -> None:
        self._root = root

    def list_folders(self) -> list[str]:
        """Return the names of the folders, without those that are being written."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def write_folder(self, name: str, files: Mapping[str, bytes], *, confirm: Callable[[], None]) -> None:
        """Write into a temporary folder that gets its name when everything is on the disk."""
        temporary = self._root / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for file, content in files.items():
                write_file(temporary / file, content)
            confirm()
            temporary.rename(self._root / name)
            sync_folder(self._root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        return (self._root / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        """Write a single file durably."""
        self._root.mkdir(parents=True, exist_ok=True)
        write_file(self._root / path, content)

    def rename_folder(self, name: str, new_name: str) -> None:
        """Give a folder another name."""
        (self._root / name).rename(self._root / new_name)
        sync_folder(self._root)

    def remove_folder(self, name: str) -> None:
        """Take the folder's name away first, then its files."""
        condemned = self._root / f"{_TEMPORARY}removed-{name}"
        (self._root / name).rename(condemned)
        shutil.rmtree(condemned, ignore_errors=True)

    def clean(self) -> None:
        """Remove temporary files and folders."""
        for path in self._root.glob(f"{_TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class ObjectStorage:
    """Prefixes in an object store, whose writes are durable and visible object by object: the last file makes a folder whole."""

    is_remote: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._files: AbstractFileSystem
        self._files, self._root = _connect(url)

    def list_folders(self) -> list[str]:
        """Return the prefixes below the root."""
        with _translated():
            try:
                entries: list[dict[str, Any]] = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def write_folder(self, name: str, files: Mapping[str, bytes], *, confirm: Callable[[], None]) -> None:
        """Write the files one after the other; what came of a failure is removed."""
        *others, last = files
        try:
            for file in others:
                self.write(f"{name}/{file}", files[file])
            confirm()
            self.write(f"{name}/{last}", files[last])
        except BaseException:
            self._discard(name)
            raise

    def read(self, path: str) -> bytes:
        """Return the content of an object."""
        with _translated():
            content: bytes = self._files.cat_file(f"{self._root}/{path}")
        return content

    def write(self, path: str, content: bytes) -> None:
        """Write one object."""
        with _translated():
            self._files.pipe_file(f"{self._root}/{path}", content)

    def rename_folder(self, name: str, new_name: str) -> None:
        """Copy the objects, then remove them."""
        with _translated():
            for path in self._files.find(f"{self._root}/{name}"):
                self._files.cp_file(path, f"{self._root}/{new_name}/{path.rpartition('/')[2]}")
                self._files.rm_file(path)

    def remove_folder(self, name: str) -> None:
        """Remove the objects, those that make the folder whole first."""
        with _translated():
            paths: list[str] = self._files.find(f"{self._root}/{name}")
            for path in sorted(paths, key=lambda path: not path.endswith(".json")):
                self._files.rm_file(path)

    def clean(self) -> None:
        """Leave what is half-written to the reader, who sees that its last file is missing."""

    def _discard(self, name: str) -> None:
        try:
            self.remove_folder(name)
        except OSError:
            # Without its last file it is no whole folder, so it does no harm.
            return


def _connect(url: str) -> tuple["AbstractFileSystem", str]:
    import fsspec  # noqa: PLC0415  takes a second with the client of the store, which most jobs do not need

    scheme, _, path = url.partition("://")
    options = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS} if scheme == "s3" else {}
    # What other processes write must be seen, so nothing is remembered.
    files = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, config_kwargs=options)
    return files, path.rstrip("/")


@contextmanager
def _translated() -> Iterator[None]:
    """Raise the client's own errors as OSError."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415  as fsspec above

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error
