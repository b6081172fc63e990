import io
import tarfile
from pathlib import Path

import pytest
from packages import DataError, allocate, integrity_of, read_members, write_folder


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        pytest.param(6, {"a": 10, "b": 20}, {"a": 2, "b": 4}, id="in proportion"),
        pytest.param(4, {"a": 10, "b": 20}, {"a": 1, "b": 3}, id="larger remainder rounds up"),
        pytest.param(3, {"a": 5, "b": 5}, {"a": 2, "b": 1}, id="ties by name"),
        pytest.param(30, {"a": 10, "b": 20}, {"a": 10, "b": 20}, id="everything"),
        pytest.param(0, {"a": 10, "b": 20}, {"a": 0, "b": 0}, id="nothing"),
    ],
)
def test_total_is_shared_out(total: int, sizes: dict[str, int], expected: dict[str, int]) -> None:
    assert allocate(total, sizes) == expected


def test_more_than_available_is_refused() -> None:
    with pytest.raises(DataError, match="31 pictures asked for, 30 available"):
        allocate(31, {"a": 10, "b": 20})


def test_folder_is_written_once(tmp_path: Path) -> None:
    files = {"a/1.png": b"one", "b/2.png": b"two"}

    assert write_folder(files, tmp_path / "made")
    assert not write_folder(files, tmp_path / "made")
    assert (tmp_path / "made" / "b" / "2.png").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_folder_with_other_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(DataError, match="exists with other content"):
        write_folder({"a/1.png": b"one"}, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_folder({"a": b"a file", "a/1.png": b"below a file"}, tmp_path / "made")

    assert list(tmp_path.iterdir()) == []


def test_members_are_read_by_their_name_in_the_package(tmp_path: Path) -> None:
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for name in ("package/img/1.png", "package/README.md"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))

    assert read_members(tarball, prefix="img/") == {"img/1.png": b"package/img/1.png"}


def test_integrity_is_written_as_npm_does(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")

    assert integrity_of(tmp_path / "empty") == (
        "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg=="
    )
