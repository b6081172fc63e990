"""Look at the data before training: what is wrong with it, what is left out for it, and what cannot be learnt from at all.

The audit also decides on the splits: by content, so that they are stable under renames and never share a picture.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune_trainer.data import Example, Listing, Split
from finetune_trainer.errors import InvalidDataError, shorten
from finetune_trainer.pictures import Pictures

MAX_LISTED_PATHS = 50
# Fewer different pictures than this cannot be spread over training and validation.
MIN_CONTENTS_TO_SHARE = 3
# When most files cannot be read, the path or the format is wrong rather than a few files.
LARGEST_UNREADABLE_SHARE = 0.5


class Kind(StrEnum):
    """What a finding is about."""

    UNREADABLE = "UnreadablePictures"
    EMPTY_CLASS = "EmptyClasses"
    CONFLICTING_LABELS = "ConflictingLabels"
    SHARED_BETWEEN_SPLITS = "SharedBetweenSplits"
    DUPLICATES = "Duplicates"
    SIMILAR_LABELS = "SimilarLabels"
    SMALL_CLASS = "SmallClasses"
    OTHER_FILES = "OtherFiles"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the data and does not stop the training."""

    kind: Kind
    message: str
    paths: tuple[str, ...] = ()

    def to_warning(self) -> str:
        """Return the finding as one line for people."""
        listed = f": {', '.join(self.paths[:5])}" if self.paths else ""
        more = f" and {len(self.paths) - 5} more" if len(self.paths) > 5 else ""
        return shorten(f"{self.message}{listed}{more}")


@dataclass(frozen=True)
class Audit:
    """What the data is used for, and what was found in it. Positions are those of the listing, in the order of contents."""

    labels: tuple[str, ...]
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    findings: tuple[Finding, ...]
    digest: str
    """SHA-256 over contents, labels and splits; independent of paths."""


def audit(listing: Listing, pictures: Pictures, *, validation_fraction: float, test_fraction: float, seed: int) -> Audit:
    """Return the usable examples with their splits; raise InvalidDataError if there is nothing to learn from them."""
    examples, digests = listing.examples, pictures.digests
    readable = _refuse_unreadable(listing, pictures)
    conflicting = _find_conflicts(examples, digests, readable)
    agreed = [index for index in readable if index not in conflicting]
    labels = tuple(sorted({examples[index].label for index in agreed}))
    if len(labels) < 2:
        raise _one_class_only(listing, labels)
    shared = _find_shared(examples, digests, agreed)
    usable = [index for index in agreed if index not in shared]
    splits = assign_splits(
        [examples[index] for index in usable],
        [digests[index] or "" for index in usable],
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    order = sorted(range(len(usable)), key=lambda i: (digests[usable[i]] or "", examples[usable[i]].label))
    parts = {split: tuple(usable[i] for i in order if splits[i] is split) for split in Split}
    _refuse_unsplit(listing, labels, parts)
    return Audit(
        labels,
        parts[Split.TRAIN],
        parts[Split.VAL],
        parts[Split.TEST],
        findings=tuple(_list_findings(listing, pictures, labels=labels, conflicting=conflicting, shared=shared, usable=usable)),
        digest=_compute_digest((digests[usable[i]] or "", examples[usable[i]].label, splits[i]) for i in order),
    )


def assign_splits(
    examples: Sequence[Example], digests: Sequence[str], *, validation_fraction: float, test_fraction: float, seed: int
) -> list[Split]:
    """Return the split of each example: the one that the data names, else one by content, with the same shares in each class.

    A split that the data names is not topped up: only fractions for splits that it does not name are taken from the rest.
    """
    named = {example.split for example in examples}
    val_share = 0.0 if Split.VAL in named else validation_fraction
    test_share = 0.0 if Split.TEST in named else test_fraction
    contents: dict[str, set[str]] = defaultdict(set)
    for example, digest in zip(examples, digests, strict=True):
        if example.split not in (Split.VAL, Split.TEST):
            contents[example.label].add(digest)
    chosen: dict[str, Split] = {}
    for members in contents.values():
        chosen |= _share_out(members, val_share=val_share, test_share=test_share, seed=seed)
    return [
        example.split if example.split in (Split.VAL, Split.TEST) else chosen[digest]
        for example, digest in zip(examples, digests, strict=True)
    ]


def _share_out(members: set[str], *, val_share: float, test_share: float, seed: int) -> dict[str, Split]:
    ranked = sorted(members, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
    num_val = _count_share(len(ranked), val_share)
    num_test = min(_count_share(len(ranked), test_share), len(ranked) - num_val - 1)
    return {
        digest: Split.TEST if rank < num_test else Split.VAL if rank < num_test + num_val else Split.TRAIN
        for rank, digest in enumerate(ranked)
    }


def _count_share(num_contents: int, share: float) -> int:
    if share == 0 or num_contents < MIN_CONTENTS_TO_SHARE:
        return 0
    return max(1, round(num_contents * share))


def _refuse_unreadable(listing: Listing, pictures: Pictures) -> list[int]:
    total, num_faults = len(listing.examples), len(pictures.faults)
    if num_faults > LARGEST_UNREADABLE_SHARE * total:
        listed = ", ".join(f"{listing.examples[i].path} ({why})" for i, why in list(pictures.faults.items())[:5])
        raise InvalidDataError(
            "UnreadablePictures",
            f"{num_faults} of {total} pictures in {listing.folder} cannot be read, such as {listed}; replace or remove them",
        )
    return [index for index in range(total) if index not in pictures.faults]


def _find_conflicts(examples: Sequence[Example], digests: Sequence[str | None], indices: Iterable[int]) -> set[int]:
    """Return the pictures whose content also stands under another label: which one is right cannot be known."""
    return {index for group in _group(digests, indices) if len({examples[i].label for i in group}) > 1 for index in group}


def _find_shared(examples: Sequence[Example], digests: Sequence[str | None], indices: Iterable[int]) -> set[int]:
    """Return the pictures that also stand in a split nearer to the final measurement, which must not have seen them."""
    rank = {Split.TEST: 2, Split.VAL: 1, Split.TRAIN: 0, None: 0}
    shared = set()
    for group in _group(digests, indices):
        highest = max(rank[examples[index].split] for index in group)
        shared |= {index for index in group if rank[examples[index].split] < highest}
    return shared


def _group(digests: Sequence[str | None], indices: Iterable[int]) -> list[list[int]]:
    groups: dict[str | None, list[int]] = defaultdict(list)
    for index in indices:
        groups[digests[index]].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _one_class_only(listing: Listing, labels: Sequence[str]) -> InvalidDataError:
    only = f"only the class {labels[0]!r}" if labels else "no class whose pictures can be used"
    empty = f"; without pictures: {', '.join(listing.empty_labels[:10])}" if listing.empty_labels else ""
    return InvalidDataError(
        "OneClassOnly", f"{listing.folder} holds {only}{empty}; a classifier needs pictures of two classes or more"
    )


def _refuse_unsplit(listing: Listing, labels: Sequence[str], parts: dict[Split, tuple[int, ...]]) -> None:
    trained = {listing.examples[index].label for index in parts[Split.TRAIN]}
    if missing := [label for label in labels if label not in trained]:
        raise InvalidDataError(
            "ClassWithoutTraining",
            f"{listing.folder}: no training pictures of {', '.join(missing[:10])}; add some, or remove the class everywhere",
        )
    if not parts[Split.VAL]:
        raise InvalidDataError(
            "TooFewPictures",
            f"{listing.folder}: no class has the {MIN_CONTENTS_TO_SHARE} different pictures that a validation split needs; "
            "add pictures, or a val folder",
        )


def _list_findings(
    listing: Listing,
    pictures: Pictures,
    *,
    labels: Sequence[str],
    conflicting: set[int],
    shared: set[int],
    usable: Sequence[int],
) -> Iterable[Finding]:
    examples = listing.examples

    def paths(indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(examples[index].path for index in sorted(indices))

    if pictures.faults:
        listed = tuple(f"{examples[index].path} ({why})" for index, why in pictures.faults.items())
        yield Finding(Kind.UNREADABLE, f"{len(listed)} pictures cannot be read and are left out", listed)
    if conflicting:
        message = f"{len(conflicting)} pictures stand under two labels with the same content and are left out"
        yield Finding(Kind.CONFLICTING_LABELS, message, paths(conflicting))
    if shared:
        message = f"{len(shared)} pictures are also in the validation or test split and are left out here"
        yield Finding(Kind.SHARED_BETWEEN_SPLITS, message, paths(shared))
    empty = sorted({*listing.empty_labels, *(example.label for example in examples)} - set(labels))
    if empty:
        yield Finding(Kind.EMPTY_CLASS, f"{len(empty)} classes have no usable picture and are left out", tuple(empty))
    for names in _find_similar(labels):
        yield Finding(Kind.SIMILAR_LABELS, "labels that differ only in case or spaces are learnt as different classes", names)
    yield from _describe_contents(examples, pictures.digests, usable)
    if listing.other_files:
        yield Finding(Kind.OTHER_FILES, f"{len(listing.other_files)} files are no pictures and are ignored", listing.other_files)


def _find_similar(labels: Iterable[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups["".join(label.casefold().replace("_", " ").replace("-", " ").split())].append(label)
    return [tuple(repr(label) for label in group) for group in groups.values() if len(group) > 1]


def _describe_contents(examples: Sequence[Example], digests: Sequence[str | None], usable: Sequence[int]) -> Iterable[Finding]:
    copies = [index for group in _group(digests, usable) for index in group[1:]]
    if copies:
        message = f"{len(copies)} pictures are exact copies of others in their class and stay in the same split"
        yield Finding(Kind.DUPLICATES, message, tuple(examples[index].path for index in copies))
    contents: dict[str, set[str | None]] = defaultdict(set)
    for index in usable:
        contents[examples[index].label].add(digests[index])
    small = [f"{label} ({len(members)})" for label, members in sorted(contents.items()) if len(members) < MIN_CONTENTS_TO_SHARE]
    if small:
        message = f"{len(small)} classes have fewer than {MIN_CONTENTS_TO_SHARE} different pictures, too few to be measured"
        yield Finding(Kind.SMALL_CLASS, message, tuple(small))


def _compute_digest(rows: Iterable[tuple[str, str, Split]]) -> str:
    total = hashlib.sha256()
    for digest, label, split in rows:
        total.update(f"{digest} {split} {label}\n".encode())
    return total.hexdigest()
