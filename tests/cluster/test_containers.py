"""Mounts that the local cluster left."""

from pathlib import Path

from localcluster.containers import mounts_below

MOUNTINFO = r"""22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
30 22 0:30 / /run/own rw - tmpfs tmpfs rw
31 30 0:31 / /run/own/a/b rw - overlay overlay rw
32 30 0:32 / /run/own/with\040space rw - overlay overlay rw
33 22 0:33 / /run/owner rw - tmpfs tmpfs rw
"""


def test_only_mounts_below_the_folder_are_listed_the_deepest_first() -> None:
    assert mounts_below(MOUNTINFO, Path("/run/own")) == ("/run/own/a/b", "/run/own/with space", "/run/own")
