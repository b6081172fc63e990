"""Which process of the job this is, and what it gets of its node: cores, and MIG slices (pure)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Slices as `nvidia-smi -L` and NVIDIA_VISIBLE_DEVICES write them, in the older and the newer form:
# https://docs.nvidia.com/datacenter/tesla/mig-user-guide/
_MIG = re.compile(r"MIG-(?:GPU-)?[0-9a-fA-F-]{36}(?:/\d+/\d+)?")


@dataclass(frozen=True)
class Seat:
    """The place of a process in the job."""

    rank: int = 0
    local_rank: int = 0
    """Its number in its pod."""
    store_host: str = ""
    """Where the processes meet."""
    store_port: int = 0


def read_seat(environment: Mapping[str, str]) -> Seat:
    """Return the seat that torchrun gives a process by its environment."""
    return Seat(
        rank=int(environment["RANK"]),
        local_rank=int(environment["LOCAL_RANK"]),
        store_host=environment["MASTER_ADDR"],
        store_port=int(environment["MASTER_PORT"]),
    )


def share_cpus(num_cpus: int, *, processes_per_node: int) -> int:
    """Return the number of threads for each process of a pod."""
    return max(1, num_cpus // processes_per_node)


def list_slices(text: str) -> tuple[str, ...]:
    """Return the MIG slices that NVIDIA_VISIBLE_DEVICES or the output of `nvidia-smi -L` names."""
    return tuple(_MIG.findall(text))


def choose_slice(slices: Sequence[str], *, local_rank: int) -> str | None:
    """Return the slice of a process, as a process cannot use two; None where there are too few."""
    return slices[local_rank] if local_rank < len(slices) else None
