"""What one block of the spec means for the pods (pure): how many, on which nodes, with what, and how many processes in each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.contract import Backend, DeviceType, World
from finetune_api.v1alpha1 import FineTuneJobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PodShape:
    """The pods of an attempt, as far as the accelerator decides on them."""

    nodes: int
    processes_per_node: int
    device: DeviceType
    backend: Backend
    accelerators: int = 0
    """Number of accelerators in each pod."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """Extended resources by name, beside cpu and memory."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shared_memory: str | None = None
    """Size of /dev/shm; None leaves the container runtime's 64 MiB."""

    def build_world(self, *, rendezvous_host: str | None) -> World:
        """Return what the trainers need to know of it."""
        return World(
            nodes=self.nodes,
            processes_per_node=self.processes_per_node,
            device=self.device,
            backend=self.backend,
            rendezvous_host=rendezvous_host,
        )


def shape_pods(spec: FineTuneJobSpec) -> PodShape:
    """Return the shape of the pods."""
    return PodShape(nodes=spec.num_nodes, processes_per_node=1, device=DeviceType.CPU, backend=Backend.GLOO)
