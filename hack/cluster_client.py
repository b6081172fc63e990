"""Run things on the local cluster: the pieces that the demo and the node tests share."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KUBECONFIG = ROOT / ".local" / "clusters" / "main" / "kubeconfig"
OPERATOR_NAMESPACE = "finetune"


def cluster(*words: str) -> str:
    """Run a command of the local cluster, its progress shown, and return what it printed."""
    return _run([sys.executable, str(ROOT / "hack" / "cluster"), *words], is_shown=True)


def program(name: str) -> str:
    """Return the path of a program of the cluster, such as kubectl or helm."""
    return _run([sys.executable, str(ROOT / "hack" / "cluster"), "path", name]).strip().splitlines()[-1]


def kubectl(*words: str, stdin: str | None = None) -> str:
    """Run kubectl as the cluster's administrator and return its output; raises CalledProcessError with it."""
    return _run([program("kubectl"), "--kubeconfig", str(KUBECONFIG), *words], stdin=stdin)


def get(*words: str) -> dict[str, Any]:
    """Return what `kubectl get` shows, as parsed JSON."""
    value: dict[str, Any] = json.loads(kubectl("get", *words, "-o", "json"))
    return value


def ensure_namespace(name: str) -> None:
    """Make a namespace that admits only pods under Pod Security restricted."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


def ensure_volume(claim: str, *, namespace: str) -> Path:
    """Make a claim with a host folder behind it, and return the folder."""
    return Path(cluster("volume", claim, "--namespace", namespace).strip().splitlines()[-1])


def install_operator(*settings: str) -> None:
    """Install or upgrade the chart with the images of this tree; settings are helm's `key=value`."""
    images: dict[str, str] = json.loads((ROOT / ".local" / "images.json").read_text(encoding="utf-8"))
    operator, trainer = (images[name].rsplit(":", 1) for name in ("operator", "trainer"))
    values = (
        f"image.repository={operator[0]}",
        f"image.tag={operator[1]}",
        f"trainer.image.repository={trainer[0]}",
        f"trainer.image.tag={trainer[1]}",
        # One node: a second replica would protect against nothing, and take from the trainers' memory.
        "replicas=1",
        *settings,
    )
    ensure_namespace(OPERATOR_NAMESPACE)
    # As text: a tag of digits alone would else arrive as a number.
    flags = [flag for value in values for flag in ("--set-string" if value.split("=")[0].endswith(".tag") else "--set", value)]
    chart = str(ROOT / "charts" / "finetune-operator")
    helm = [program("helm"), "--kubeconfig", str(KUBECONFIG), "--namespace", OPERATOR_NAMESPACE]
    _run([*helm, "upgrade", "--install", "finetune-operator", chart, "--wait", "--timeout", "180s", *flags])


def _run(command: Sequence[str], *, stdin: str | None = None, is_shown: bool = False) -> str:
    """Run a command; its output is returned, shown as it comes if asked, and part of the error if it fails."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        if not is_shown else None, text=True,
    ) as process:  # fmt: skip
        if is_shown:
            lines = []
            assert process.stdout is not None
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                lines.append(line)
            output, errors = "".join(lines), ""
            process.wait()
        else:
            output, errors = process.communicate(stdin)
    if process.returncode != 0:
        raise CommandError(f"{' '.join(command[:4])} ... failed with status {process.returncode}:\n{errors or output}")
    return output


class CommandError(RuntimeError):
    """A command that failed, with what it printed."""
