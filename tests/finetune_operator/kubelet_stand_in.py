"""A stand-in for the kubelet: it runs each pod of a namespace, and stops each that is being deleted before it is gone."""

import contextlib
import threading
from types import TracebackType
from typing import Any

from harness import Team

# Keeps a pod until its trainer has ended, as a node does, though no node has it.
_FINALIZER = "finetune.dev/kubelet-stand-in"
_LOOK_SECONDS = 0.1


class KubeletStandIn:
    """Plays the node of a team's pods; a trainer leaves with exit code 75 when its pod is deleted."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._play, name="kubelet stand-in", daemon=True)
        self.held: set[str] = set()
        """FineTuneJobs whose trainers do not stop."""

    def __enter__(self) -> "KubeletStandIn":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join(30)
        for pod in self._list_pods():
            self._release(pod)

    def _play(self) -> None:
        while not self._is_over.wait(_LOOK_SECONDS):
            for pod in self._list_pods():
                # It may be gone by now.
                with contextlib.suppress(AssertionError):
                    self._attend(pod)

    def _attend(self, pod: dict[str, Any]) -> None:
        metadata, phase = pod["metadata"], pod["status"].get("phase")
        is_deleted, is_ended = "deletionTimestamp" in metadata, phase in ("Succeeded", "Failed")
        if not is_deleted and phase == "Pending":
            self._set_finalizers(pod, [*metadata.get("finalizers", ()), _FINALIZER])
            self._team.run_pod(pod)
        elif is_deleted and not is_ended and metadata["name"].rsplit("-", 4)[0] not in self.held:
            self._team.end_pod(pod, 75)
            self._release(pod)
        elif is_deleted and is_ended:
            self._release(pod)

    def _release(self, pod: dict[str, Any]) -> None:
        finalizers = pod["metadata"].get("finalizers", [])
        if _FINALIZER in finalizers:
            with contextlib.suppress(AssertionError):
                self._set_finalizers(pod, [each for each in finalizers if each != _FINALIZER])

    def _set_finalizers(self, pod: dict[str, Any], finalizers: list[str]) -> None:
        metadata = {"finalizers": finalizers, "resourceVersion": pod["metadata"]["resourceVersion"]}
        self._team.api.patch(self._team.path("pods", pod["metadata"]["name"]), {"metadata": metadata})

    def _list_pods(self) -> list[dict[str, Any]]:
        with contextlib.suppress(AssertionError, OSError):
            return list(self._team.api.get(self._team.path("pods"))["items"])
        return []
