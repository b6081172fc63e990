"""A recorded process is told from a later one with the same id."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from localcluster.paths import Instance
from localcluster.processes import is_alive, is_program_of, is_running, parse_start_ticks, read_record, record_of

STAT_TAIL = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"


def test_own_process_is_alive() -> None:
    record = record_of(os.getpid())

    assert record is not None
    assert is_alive(record)


def test_process_with_another_start_time_is_not_the_recorded_one() -> None:
    record = record_of(os.getpid())

    assert record is not None
    assert not is_alive(replace(record, start_ticks=record.start_ticks + 1))


def test_process_of_an_earlier_boot_is_not_the_recorded_one() -> None:
    record = record_of(os.getpid())

    assert record is not None
    assert not is_alive(replace(record, boot_id="earlier"))


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        pytest.param(f"12 (etcd) S {STAT_TAIL}", 4711, id="plain name"),
        pytest.param(f"12 (a (b) c) R {STAT_TAIL}", 4711, id="name with parentheses and spaces"),
        pytest.param(f"12 (etcd) Z {STAT_TAIL}", None, id="zombie"),
    ],
)
def test_start_time_is_read_from_the_process_table(stat: str, expected: int | None) -> None:
    assert parse_start_ticks(stat) == expected


@pytest.mark.parametrize(
    "text", [pytest.param("", id="empty"), pytest.param('{"pid": 1', id="cut"), pytest.param("{}", id="no field")]
)
def test_half_written_record_counts_as_none(tmp_path: Path, text: str) -> None:
    instance = Instance(tmp_path)
    instance.processes.mkdir()
    (instance.processes / "etcd.json").write_text(text)

    assert read_record(instance, "etcd") is None
    assert not is_running(instance, "etcd")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(("/cache/etcd", "--data-dir=/tree/main/etcd"), True, id="own"),
        pytest.param(("/cache/etcd", "--data-dir=/tree/other/etcd"), False, id="of another cluster"),
        pytest.param(("/cache/etcd", "--data-dir=/tree/main2/etcd"), False, id="of a cluster with a longer name"),
        pytest.param(("tail", "/tree/main/logs/etcd.log"), False, id="another program on own files"),
        pytest.param((), False, id="kernel thread"),
    ],
)
def test_program_is_recognised_by_its_name_and_the_folder_of_its_cluster(command: tuple[str, ...], *, expected: bool) -> None:
    assert is_program_of(Instance(Path("/tree/main")), "etcd", command) is expected
