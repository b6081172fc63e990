import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_api.v1alpha1 import DatasetFormat
from finetune_trainer.audit import Audit, Kind, assign_splits, audit
from finetune_trainer.data import Example, Split, list_examples
from finetune_trainer.errors import InvalidDataError
from finetune_trainer.pictures import load_pictures
from PIL import Image


def run_audit(folder: Path, layout: DatasetFormat = DatasetFormat.IMAGEFOLDER, seed: int = 0) -> Audit:
    listing = list_examples(folder, layout)
    pictures = load_pictures(listing, image_size=8, num_threads=2, scratch=folder, check=lambda: None, advance=lambda _: None)
    return audit(listing, pictures, validation_fraction=0.2, test_fraction=0.2, seed=seed)


def write_table(folder: Path, text: str) -> None:
    (folder / "labels.csv").write_text(text)


def found(audited: Audit, kind: Kind) -> tuple[str, ...]:
    return next((finding.paths for finding in audited.findings if finding.kind is kind), ())


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def split_layout(data: Path) -> None:
    """Move class folders into train, val and test folders."""
    for label in sorted(entry.name for entry in data.iterdir()):
        for number, path in enumerate(sorted((data / label).iterdir())):
            folder = data / ("train", "train", "train", "validation", "test")[number % 5] / label
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)
        (data / label).rmdir()


def test_clean_data_has_no_findings(make_pictures: Any) -> None:
    assert run_audit(make_pictures()).findings == ()


@pytest.mark.parametrize(
    ("kind", "break_data", "expected"),
    [
        pytest.param(
            Kind.UNREADABLE,
            lambda data: (data / "blue/000.png").write_bytes(b"not a picture"),
            ("blue/000.png (not a picture)",),
            id="unreadable file",
        ),
        pytest.param(
            Kind.UNREADABLE,
            lambda data: (data / "blue/000.png").write_bytes(b""),
            ("blue/000.png (not a picture)",),
            id="empty file",
        ),
        pytest.param(Kind.EMPTY_CLASS, lambda data: (data / "amber").mkdir(), ("amber",), id="empty class"),
        pytest.param(
            Kind.CONFLICTING_LABELS,
            lambda data: shutil.copy(data / "blue/000.png", data / "green/copy.png"),
            ("blue/000.png", "green/copy.png"),
            id="the same content under two labels",
        ),
        pytest.param(
            Kind.DUPLICATES,
            lambda data: shutil.copy(data / "blue/000.png", data / "blue/copy.png"),
            ("blue/copy.png",),
            id="exact copies",
        ),
        pytest.param(
            Kind.SIMILAR_LABELS,
            lambda data: [
                copy(path, data / "Blue " / path.name) or path.unlink() for path in sorted((data / "blue").iterdir())[:5]
            ],
            ("'Blue '", "'blue'"),
            id="labels that differ in case and spaces",
        ),
        pytest.param(
            Kind.SMALL_CLASS,
            lambda data: [path.unlink() for path in sorted((data / "blue").iterdir())[2:]],
            ("blue (2)",),
            id="small class",
        ),
        pytest.param(Kind.OTHER_FILES, lambda data: (data / "notes.txt").write_text("x"), ("notes.txt",), id="other files"),
    ],
)
def test_fault_is_listed_with_its_paths(make_pictures: Any, kind: Kind, break_data: Any, expected: tuple[str, ...]) -> None:
    data = make_pictures()
    break_data(data)

    audited = run_audit(data)

    assert found(audited, kind) == expected
    assert [finding.kind for finding in audited.findings] == [kind]


def test_truncated_picture_is_unreadable(make_pictures: Any) -> None:
    data = make_pictures()
    Image.effect_noise((64, 64), 50).save(data / "blue/cut.jpg")
    (data / "blue/cut.jpg").write_bytes((data / "blue/cut.jpg").read_bytes()[:900])

    assert found(run_audit(data), Kind.UNREADABLE)[0].startswith("blue/cut.jpg (image file is truncated")


def test_picture_shared_between_given_splits_leaves_the_training_data(make_pictures: Any) -> None:
    data = make_pictures()
    split_layout(data)
    shutil.copy(data / "test/blue/004.png", data / "train/blue/again.png")

    audited = run_audit(data)

    assert found(audited, Kind.SHARED_BETWEEN_SPLITS) == ("train/blue/again.png",)
    assert (len(audited.train), len(audited.val), len(audited.test)) == (36, 12, 12)


@pytest.mark.parametrize(
    ("reason", "break_data", "expected"),
    [
        pytest.param("DatasetNotFound", shutil.rmtree, "there is no folder", id="no folder"),
        pytest.param(
            "NoPictures", lambda data: [shutil.rmtree(path) for path in data.iterdir()], "no pictures", id="empty folder"
        ),
        pytest.param(
            "OneClassOnly", lambda data: [shutil.rmtree(data / label) for label in ("blue", "green")], "'violet'", id="one class"
        ),
        pytest.param(
            "UnreadablePictures",
            lambda data: [path.write_bytes(b"x") for path in sorted(data.glob("*/*"))[:40]],
            "blue/000.png (not a picture)",
            id="most pictures unreadable",
        ),
        pytest.param(
            "TooFewPictures",
            lambda data: [path.unlink() for path in data.glob("*/*") if path.stem > "001"],
            "validation split",
            id="too few pictures to split",
        ),
        pytest.param("LabelsFileNotFound", None, "labels.csv", id="csv: no table"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(make_pictures: Any, reason: str, break_data: Any, expected: str) -> None:
    data = make_pictures()
    if break_data:
        break_data(data)

    with pytest.raises(InvalidDataError) as caught:
        run_audit(data, DatasetFormat.IMAGEFOLDER if break_data else DatasetFormat.CSV)

    assert caught.value.reason == reason
    assert expected in caught.value.message
    assert str(data) in caught.value.message


def test_labels_come_from_the_table(make_pictures: Any) -> None:
    data = make_pictures()
    rows = [f"{path.relative_to(data)},{path.parent.name},{'test' if path.stem < '004' else ''}" for path in data.glob("*/*")]
    write_table(data, "\n".join(["path,label,split", *rows, "blue/missing.png,blue,train"]))

    audited = run_audit(data, DatasetFormat.CSV)

    assert audited.labels == ("blue", "green", "violet")
    assert len(audited.test) == 12
    assert len(audited.val) == 9
    assert found(audited, Kind.UNREADABLE) == ("blue/missing.png (no such file or directory)",)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        pytest.param("file,class\na.png,b\n", "it must name path and label", id="columns"),
        pytest.param("path,label\na.png,\n", "line 2: path and label must both be given", id="empty label"),
        pytest.param("path,label\n../a.png,b\n", "not a path below", id="path outside"),
        pytest.param("path,label\n/a.png,b\n", "not a path below", id="absolute path"),
        pytest.param("path,label,split\na.png,b,dev\n", "'dev' is none of train, val and test", id="unknown split"),
        pytest.param("path,label\n", "lists no pictures", id="no rows"),
    ],
)
def test_faulty_table_is_refused_with_the_line(tmp_path: Path, table: str, expected: str) -> None:
    write_table(tmp_path, table)

    with pytest.raises(InvalidDataError, match=r"labels\.csv") as caught:
        list_examples(tmp_path, DatasetFormat.CSV)

    assert expected in caught.value.message


def test_class_called_test_is_no_split(make_pictures: Any) -> None:
    data = make_pictures()
    (data / "blue").rename(data / "test")

    assert run_audit(data).labels == ("green", "test", "violet")


def build_examples(
    count: int, *, labels: tuple[str, ...] = ("a", "b"), split: Split | None = None
) -> tuple[list[Example], list[str]]:
    examples = [Example(f"{label}/{number}.png", label, split) for label in labels for number in range(count)]
    return examples, [f"{example.label}-{example.path}" for example in examples]


def test_splits_have_the_same_shares_in_every_class() -> None:
    examples, digests = build_examples(100, labels=("a", "b", "c"))

    splits = assign_splits(examples, digests, validation_fraction=0.15, test_fraction=0.25, seed=0)

    counts = Counter((example.label, split) for example, split in zip(examples, splits, strict=True))
    assert all(counts[label, Split.VAL] == 15 and counts[label, Split.TEST] == 25 for label in "abc")


def test_duplicates_stay_on_one_side() -> None:
    examples, digests = build_examples(60)
    twins = [Example(f"copy-of/{example.path}", example.label) for example in examples]

    splits = assign_splits([*examples, *twins], [*digests, *digests], validation_fraction=0.2, test_fraction=0.2, seed=1)

    assert splits[: len(examples)] == splits[len(examples) :]


def test_splits_are_stable_under_renames_and_order() -> None:
    examples, digests = build_examples(40)
    renamed = [Example(f"x{index}", example.label) for index, example in enumerate(examples)]

    before = assign_splits(examples, digests, validation_fraction=0.2, test_fraction=0.2, seed=5)
    after = assign_splits(renamed[::-1], digests[::-1], validation_fraction=0.2, test_fraction=0.2, seed=5)

    assert after[::-1] == before


@pytest.mark.parametrize("count", range(1, 12))
def test_every_class_keeps_training_data(count: int) -> None:
    examples, digests = build_examples(count)

    splits = assign_splits(examples, digests, validation_fraction=0.5, test_fraction=0.4, seed=0)

    for label in "ab":
        assert Split.TRAIN in [split for example, split in zip(examples, splits, strict=True) if example.label == label]


def test_given_splits_are_kept_and_missing_ones_are_taken_from_training() -> None:
    train, train_digests = build_examples(20, split=Split.TRAIN)
    test, test_digests = build_examples(5, split=Split.TEST)

    splits = assign_splits(
        [*train, *test],
        [*train_digests, *(f"t{digest}" for digest in test_digests)],
        validation_fraction=0.2,
        test_fraction=0.2,
        seed=0,
    )

    assert splits[len(train) :] == [Split.TEST] * len(test)
    assert Counter(splits[: len(train)]) == {Split.TRAIN: 32, Split.VAL: 8}


def test_large_pixel_array_lives_in_a_file(make_pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_pictures()
    monkeypatch.setattr("finetune_trainer.pictures.LARGEST_ARRAY_BYTES", 0)
    listing = list_examples(data, DatasetFormat.IMAGEFOLDER)

    pictures = load_pictures(listing, image_size=8, num_threads=2, scratch=data, check=lambda: None, advance=lambda _: None)

    assert isinstance(pictures.pixels_NHWC, np.memmap)
    assert pictures.pixels_NHWC.any()
    assert sorted(entry.name for entry in data.iterdir()) == ["blue", "green", "violet"]
