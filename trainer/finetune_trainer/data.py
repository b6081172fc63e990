"""List the labelled pictures of a data set: class folders, or a table in labels.csv."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from finetune_api.v1alpha1 import DatasetFormat
from PIL import Image

from finetune_trainer.errors import InvalidDataError


class Split(StrEnum):
    """What an example is used for."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


_SPLIT_NAMES = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "test": Split.TEST,
    "testing": Split.TEST,
}
LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class Example:
    """One labelled picture, with its split if the data names one."""

    path: str
    """Path below the folder of the data set."""
    label: str
    split: Split | None = None


@dataclass(frozen=True)
class Listing:
    """What the folder of a data set holds."""

    folder: Path
    examples: tuple[Example, ...]
    empty_labels: tuple[str, ...] = ()
    """Classes that have a folder and no picture."""
    other_files: tuple[str, ...] = ()
    """Files that are no pictures by their names."""


def list_examples(folder: Path, layout: DatasetFormat) -> Listing:
    """Return the labelled pictures in `folder`; raise InvalidDataError if there is nothing to learn from."""
    if not folder.is_dir():
        raise InvalidDataError(
            "DatasetNotFound", f"dataset: there is no folder {folder}; {_describe_nearest(folder)}; give the path of the data"
        )
    listing = _list_table(folder) if layout is DatasetFormat.CSV else _list_class_folders(folder)
    if not listing.examples:
        raise InvalidDataError("NoPictures", _describe_no_pictures(folder, layout))
    return listing


def _list_class_folders(folder: Path) -> Listing:
    subfolders = _list_folders(folder)
    named = {entry: _SPLIT_NAMES[entry.name.lower()] for entry in subfolders if entry.name.lower() in _SPLIT_NAMES}
    # A class may be called "test"; only beside a folder for training is it a split.
    if Split.TRAIN not in named.values() or len(named) < len(subfolders):
        return _list_classes(folder, folder, split=None)
    parts = [_list_classes(folder, entry, split=split) for entry, split in named.items()]
    examples = tuple(example for part in parts for example in part.examples)
    labels = {example.label for example in examples}
    return Listing(
        folder,
        examples,
        empty_labels=tuple(sorted({label for part in parts for label in part.empty_labels} - labels)),
        other_files=tuple(path for part in parts for path in part.other_files),
    )


def _list_classes(root: Path, folder: Path, *, split: Split | None) -> Listing:
    examples: list[Example] = []
    others = [str(path.relative_to(root)) for path in _list_files(folder, recursive=False)]
    empty = []
    for subfolder in _list_folders(folder):
        found = len(examples)
        for path in _list_files(subfolder, recursive=True):
            if _is_picture(path):
                examples.append(Example(str(path.relative_to(root)), subfolder.name, split))
            else:
                others.append(str(path.relative_to(root)))
        if len(examples) == found:
            empty.append(subfolder.name)
    return Listing(root, tuple(examples), tuple(empty), tuple(others))


def _list_table(folder: Path) -> Listing:
    table = folder / LABELS_FILE
    if not table.is_file():
        raise InvalidDataError(
            "LabelsFileNotFound",
            f"dataset.format csv: there is no file {table}; add one with the columns path,label and, optionally, split",
        )
    with table.open(newline="", encoding="utf-8-sig") as stream:
        try:
            return Listing(folder, tuple(_read_rows(table, csv.DictReader(stream))))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidDataError("InvalidLabelsFile", f"{table}: {error}; save it as CSV in UTF-8") from error


def _read_rows(table: Path, reader: "csv.DictReader[str]") -> Iterator[Example]:
    columns = reader.fieldnames or []
    if not {"path", "label"} <= set(columns):
        raise InvalidDataError(
            "InvalidLabelsFile", f"{table}: the first line names the columns {list(columns)}; it must name path and label"
        )
    for row in reader:
        place = f"{table}, line {reader.line_num}"
        path, label, split = row["path"] or "", row["label"] or "", (row.get("split") or "").strip().lower()
        if not path or not label:
            raise InvalidDataError("InvalidLabelsFile", f"{place}: path and label must both be given")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise InvalidDataError("InvalidLabelsFile", f"{place}: {path} is not a path below {table.parent}")
        if split and split not in _SPLIT_NAMES:
            raise InvalidDataError("InvalidLabelsFile", f"{place}: the split {split!r} is none of train, val and test")
        yield Example(path, label, _SPLIT_NAMES.get(split))


def _list_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry))


def _list_files(folder: Path, *, recursive: bool) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry):
            continue
        if entry.is_file():
            yield entry
        elif recursive and entry.is_dir():
            yield from _list_files(entry, recursive=True)


def _is_hidden(path: Path) -> bool:
    # Leftovers of file systems, archives and NAS devices.
    return path.name.startswith((".", "@")) or path.name in ("lost+found", "__MACOSX", "Thumbs.db")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions()


def _describe_nearest(folder: Path) -> str:
    for parent in folder.parents:
        if parent.is_dir():
            return f"{parent} holds {_name_some(entry.name for entry in sorted(parent.iterdir()))}"
    return "nothing of that path exists"


def _describe_no_pictures(folder: Path, layout: DatasetFormat) -> str:
    held = _name_some(entry.name for entry in sorted(folder.iterdir()))
    if layout is DatasetFormat.CSV:
        return f"{folder / LABELS_FILE} lists no pictures; add a line path,label for each"
    return f"no pictures found in {folder}, which holds {held}; put them into one folder per class: {folder}/LABEL/PICTURE"


def _name_some(names: Iterator[str]) -> str:
    some = list(names)
    if not some:
        return "nothing"
    return ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")
