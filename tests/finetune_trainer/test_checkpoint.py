"""Checkpoints in a folder and in a real object store: what is kept, what is refused, and who may write."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.budget import Budget
from finetune_trainer.checkpoint import Checkpoints, Writer, read_elapsed_seconds
from finetune_trainer.errors import InvalidSpecError, PreemptedError, StorageError
from finetune_trainer.fence import FENCE_FILE, Fence
from finetune_trainer.progress import Progress
from finetune_trainer.storage import FolderStorage, ObjectStorage, Storage, open_storage

IDENTITY = {"hyperparameters.imageSize": "96", "dataset.sha256": "d" * 64}


@dataclass
class Trainer:
    """Stands for one attempt: it claims the folder and saves numbers."""

    storage: Storage
    attempt: int = 1
    run: str = "run-1"
    uid: str = "uid-1"
    generation: int = 1
    keep: int = 2
    identity: dict[str, str] = field(default_factory=lambda: IDENTITY)
    elapsed_seconds: float = 12.5
    progress: Progress = field(default_factory=lambda: Progress(Budget(None, 0.0), (), with_finetune=True))

    def __post_init__(self) -> None:
        fence = Fence(self.storage, run=self.run, attempt=self.attempt, uid=self.uid, generation=self.generation)
        fence.raise_up("the folder")
        writer = Writer(
            self.run,
            self.attempt,
            keep=self.keep,
            interval_seconds=60,
            threads=2,
            elapsed_seconds=lambda: self.elapsed_seconds,
        )
        self.checkpoints = Checkpoints(self.storage, fence, writer, identity=self.identity, progress=self.progress)

    def save(self, value: float, *, stage: str = "steps") -> bool:
        step = int(value)
        tensors = {"w": torch.full((1000,), value)}
        return self.checkpoints.save(stage, tensors=tensors, state={"value": value}, step=step, samples=8 * step)

    def load(self, stage: str = "steps") -> float | None:
        kept = self.checkpoints.load(stage)
        assert kept is None or bool((kept.tensors["w"] == kept.state["value"]).all())
        return None if kept is None else kept.state["value"]


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "checkpoints"))
    return open_storage(request.getfixturevalue("bucket"))


def list_checkpoints(storage: Storage) -> list[str]:
    return [name for name in storage.list_folders() if name.startswith("checkpoint-")]


def test_newest_checkpoint_of_the_stage_is_loaded(storage: Storage) -> None:
    trainer = Trainer(storage)
    for value in (1.0, 2.0):
        assert trainer.save(value)
    trainer.save(3.0, stage="finetuned")

    assert Trainer(storage, attempt=2).load() == 2.0
    assert Trainer(storage, attempt=2).load("nothing") is None


def test_only_the_newest_of_each_stage_are_kept(storage: Storage) -> None:
    trainer = Trainer(storage, keep=2)
    trainer.save(9.0, stage="probe")
    for value in (1.0, 2.0, 3.0, 4.0):
        trainer.save(value)

    assert list_checkpoints(storage) == ["checkpoint-000001-probe", "checkpoint-000004-steps", "checkpoint-000005-steps"]


def test_report_tells_what_is_saved_and_by_whom(storage: Storage) -> None:
    Trainer(storage, attempt=3).save(7.0)

    resumed = Trainer(storage, attempt=4)
    assert resumed.progress.report().checkpoint is None
    resumed.load()

    kept = resumed.progress.report().checkpoint
    assert kept is not None
    assert (kept.step, kept.samples, kept.attempt) == (7, 56, 3)


def damage(storage: Storage, name: str, file: str, how: str) -> None:
    content = storage.read(f"{name}/{file}")
    half = len(content) // 2
    changes: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: content[:half],
        "bit-flipped": lambda: content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
    }
    if how != "missing":
        storage.write(f"{name}/{file}", changes[how]())
    elif isinstance(storage, ObjectStorage):
        storage._files.rm_file(f"{storage._root}/{name}/{file}")
    else:
        assert isinstance(storage, FolderStorage)
        (storage._root / name / file).unlink()


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "bit-flipped"])
def test_broken_checkpoint_is_set_aside_and_the_one_before_is_loaded(storage: Storage, file: str, how: str) -> None:
    trainer = Trainer(storage)
    for value in (1.0, 2.0):
        trainer.save(value)
    damage(storage, "checkpoint-000002-steps", file, how)

    resumed = Trainer(storage, attempt=2)

    assert resumed.load() == 1.0
    assert list_checkpoints(storage) == ["checkpoint-000001-steps"]
    assert "broken-checkpoint-000002-steps" in storage.list_folders()
    assert ["checkpoint-000002-steps" in text and "set aside" in text for text in resumed.checkpoints.warnings] == [True]
    metrics = {metric.name: metric.value for metric in resumed.progress.report().trainer_status.metrics}
    assert metrics == {"broken_checkpoints": "1"}
    assert resumed.save(3.0)
    assert list_checkpoints(storage)[-1] == "checkpoint-000003-steps"


def test_checkpoint_of_other_settings_is_refused_with_the_field(storage: Storage) -> None:
    Trainer(storage, identity={**IDENTITY, "hyperparameters.imageSize": "128"}).save(1.0)

    resumed = Trainer(storage, attempt=2)

    assert resumed.load() is None
    assert resumed.checkpoints.warnings == (
        "not resuming from checkpoint-000001-steps: hyperparameters.imageSize was 128 and is 96",
    )


def test_warnings_outlive_the_attempt(storage: Storage) -> None:
    first = Trainer(storage)
    first.checkpoints.warn("memory ran out")
    first.save(1.0)

    resumed = Trainer(storage, attempt=2)
    resumed.load()

    assert resumed.checkpoints.warnings == ("memory ran out",)


def test_time_of_earlier_attempts_is_known(storage: Storage) -> None:
    for attempt, seconds in ((1, 10.0), (2, 25.0)):
        Trainer(storage, attempt=attempt, elapsed_seconds=seconds).save(1.0)

    assert read_elapsed_seconds(storage, run="run-1") == 25.0
    assert read_elapsed_seconds(storage, run="another") == 0.0


def test_older_attempt_refuses_to_write_and_to_start(storage: Storage) -> None:
    older = Trainer(storage, attempt=1)
    older.save(1.0)
    newer = Trainer(storage, attempt=2)

    with pytest.raises(PreemptedError, match="attempt 2 of run run-1") as caught:
        older.save(2.0)
    with pytest.raises(PreemptedError, match="attempt 1 of run run-1 writes nothing more"):
        older.checkpoints.confirm()
    with pytest.raises(PreemptedError):
        Trainer(storage, attempt=1)

    assert (caught.value.reason, int(caught.value.exit_code)) == ("Superseded", 75)
    assert list_checkpoints(storage) == ["checkpoint-000001-steps"]
    assert newer.save(3.0)
    assert json.loads(storage.read("checkpoint-000002-steps/manifest.json"))["attempt"] == 2


def test_attempt_that_is_overtaken_while_it_writes_leaves_nothing(storage: Storage) -> None:
    older = Trainer(storage, attempt=1)

    def be_overtaken() -> None:
        Trainer(storage, attempt=2)
        older.checkpoints.confirm()

    with pytest.raises(PreemptedError):
        storage.write_folder("checkpoint-000009-steps", {"a": b"1", "manifest.json": b"2"}, confirm=be_overtaken)

    assert storage.list_folders() == []


def test_of_two_processes_with_the_same_attempt_the_later_one_may_write(storage: Storage) -> None:
    first, second = Trainer(storage), Trainer(storage)

    with pytest.raises(PreemptedError, match="belongs to attempt 1"):
        first.save(1.0)
    assert second.save(2.0)


def test_new_run_takes_the_folder_over(storage: Storage) -> None:
    old = Trainer(storage, run="run-1", attempt=5)

    assert Trainer(storage, run="run-2", attempt=1).save(1.0)
    with pytest.raises(PreemptedError):
        old.save(2.0)


@pytest.mark.parametrize("successor", [{"uid": "uid-2"}, {"generation": 4}], ids=["created anew", "returned to an earlier spec"])
def test_run_that_begins_once_more_takes_the_folder_over_and_goes_on(storage: Storage, successor: dict[str, Any]) -> None:
    old = Trainer(storage, attempt=3, generation=2)
    old.save(1)
    new = Trainer(storage, attempt=1, **successor)

    assert 1 == new.load()
    assert new.save(2)
    with pytest.raises(PreemptedError):
        old.save(3)


def test_clearing_leaves_nothing_but_the_claim(storage: Storage) -> None:
    trainer = Trainer(storage)
    trainer.save(1.0)
    damage(storage, "checkpoint-000001-steps", "state.json", "truncated")
    trainer.load()
    trainer.save(2.0)

    trainer.checkpoints.clear()

    assert storage.list_folders() == []
    assert json.loads(storage.read(FENCE_FILE))["attempt"] == 1


def test_half_written_checkpoint_is_invisible_and_removed(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    trainer = Trainer(storage)
    trainer.save(1.0)
    (tmp_path / "checkpoint-000001-steps").rename(tmp_path / ".tmp-checkpoint-000001-steps")

    assert Trainer(storage, attempt=2).load() is None
    assert [path.name for path in tmp_path.iterdir()] == [FENCE_FILE]


@contextmanager
def small_files() -> Iterator[None]:
    """Keep files of this process below 2 kB, as on a disk that is full; those of the test runner too, so only for a moment."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_loses_no_earlier_checkpoint_and_stops_nothing(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    trainer = Trainer(storage, keep=1)
    trainer.save(1.0)

    with small_files():
        is_saved = trainer.save(2.0)

    assert not is_saved
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001-steps", FENCE_FILE]
    assert [os.strerror(errno.EFBIG) in text for text in trainer.checkpoints.warnings] == [True]
    assert Trainer(storage, attempt=2).load() == 1.0


def test_store_that_is_away_is_trouble_for_a_retry(
    bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    with pytest.raises(StorageError) as caught:
        Trainer(open_storage(bucket))

    assert int(caught.value.exit_code) == 1


@pytest.mark.parametrize("location", ["s3", "folder"])
def test_place_that_does_not_exist_is_the_users_mistake(bucket: str, tmp_path: Path, location: str) -> None:
    (tmp_path / "file").touch()
    place = "s3://no-such-bucket/x" if location == "s3" else str(tmp_path / "file" / "below")

    with pytest.raises(InvalidSpecError, match=r"spec\.checkpoint\.uri") as caught:
        Trainer(open_storage(place))

    assert caught.value.reason == "CheckpointsNotWritable"
