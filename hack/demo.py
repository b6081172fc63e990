"""The main job on the local cluster: pictures in, fine-tuned model out."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster_client import (
    KUBECONFIG,
    ROOT,
    CommandError,
    cluster,
    ensure_namespace,
    ensure_volume,
    get,
    install_operator,
    kubectl,
)

_NAMESPACE = "demo"
_TIMEOUT_SECONDS = 900
_SHOWN_METRICS = ("test_accuracy", "test_macro_f1", "test_ece", "val_accuracy")
_NUM_PREDICTIONS = 6


def main() -> int:
    """Run the demo and return the exit status: 0 only if the job became Complete and its model predicts."""
    started = time.monotonic()
    try:
        _say("the programs of Kubernetes, and the images of the operator and the trainer")
        cluster("prepare")
        _say("a Kubernetes cluster on this machine")
        cluster("up")
        _say("pictures: 1,906 emojis in 9 categories")
        pictures, models = _prepare_volumes()
        _say("the operator, by its chart")
        install_operator()
        print(kubectl("-n", "finetune", "get", "pods"), end="")
        _say("kubectl apply -f examples/emoji.yaml")
        _apply_job(models)
        job = _follow()
        _show(job)
        _predict(models / "emoji", pictures)
    except (CommandError, subprocess.CalledProcessError, DemoError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print(
        _NEXT.format(seconds=time.monotonic() - started, kubeconfig=KUBECONFIG.relative_to(ROOT), models=models.relative_to(ROOT))
    )
    return 0


_NEXT = """
Done in {seconds:.0f} s. The cluster is still up. What to try next:
  eval "$(python3 hack/cluster env)"                  # kubectl, helm and KUBECONFIG={kubeconfig}
  kubectl -n demo get ftj,jobs,pods
  kubectl -n demo describe ftj emoji
  kubectl explain ftj.spec.hyperparameters
  kubectl -n demo patch ftj emoji --type merge -p '{{"spec":{{"budget":{{"trainingSeconds":240}}}}}}'   # a new run
  ls {models}/emoji                                   # the model
  make cluster-down                                   # stop everything
"""


class DemoError(RuntimeError):
    """The job did not end as it should."""


def _prepare_volumes() -> tuple[Path, Path]:
    """Return the host folders of the pictures and of the models, the pictures in place."""
    ensure_namespace(_NAMESPACE)
    datasets = ensure_volume("datasets", namespace=_NAMESPACE)
    models = ensure_volume("models", namespace=_NAMESPACE)
    subprocess.run([sys.executable, str(ROOT / "hack" / "data" / "emoji.py"), str(datasets / "emoji")], check=True)
    return datasets / "emoji", models


def _apply_job(models: Path) -> None:
    """Apply the example anew: the job of an earlier demo is deleted with its model, so that it trains again."""
    kubectl("-n", _NAMESPACE, "delete", "finetunejob", "emoji", "--ignore-not-found", "--cascade=foreground", "--wait")
    shutil.rmtree(models / "emoji", ignore_errors=True)
    print(kubectl("-n", _NAMESPACE, "apply", "-f", str(ROOT / "examples" / "emoji.yaml")), end="")


def _follow() -> dict[str, Any]:
    """Print each change of the job until it is finished, and return it."""
    shown = ""
    job: dict[str, Any]
    started = time.monotonic()
    while time.monotonic() - started < _TIMEOUT_SECONDS:
        job = get("-n", _NAMESPACE, "finetunejob", "emoji")
        line = _describe(job)
        if line != shown:
            print(f"  {time.monotonic() - started:5.0f} s  {line}", flush=True)
            shown = line
        for condition in job.get("status", {}).get("conditions", ()):
            if condition["type"] == "Complete" and condition["status"] == "True":
                return job
            if condition["type"] == "Failed" and condition["status"] == "True":
                raise DemoError(f"the job failed: {condition['message']}\n{json.dumps(job['status'].get('failure'), indent=2)}")
        time.sleep(1)
    raise DemoError(
        f"the job was not complete after {_TIMEOUT_SECONDS} s:\n{kubectl('-n', _NAMESPACE, 'describe', 'ftj', 'emoji')}"
    )


def _describe(job: dict[str, Any]) -> str:
    status = job.get("status", {})
    ready = next((each for each in status.get("conditions", ()) if each["type"] == "Ready"), None)
    if ready is None:
        return "(no status yet)"
    trainer = status.get("trainerStatus", {})
    progress = f"{trainer['progressPercentage']:3d} %" if "progressPercentage" in trainer else ""
    remaining = trainer.get("estimatedRemainingSeconds")
    metrics = ", ".join(f"{each['name']} {each['value']}" for each in trainer.get("metrics", ())[:4])
    parts = (ready["reason"], progress, f"{remaining} s left" if remaining else "", metrics or ready["message"])
    return "  ".join(part for part in parts if part)


def _show(job: dict[str, Any]) -> None:
    _say("the job as kubectl shows it")
    print(kubectl("-n", _NAMESPACE, "get", "ftj", "emoji"), end="")
    status = job["status"]
    print(f"\nmodel   {status['output']['uri']}  {status['output']['bytes']:,} bytes\ndigest  {status['output']['digest']}")
    print(f"chosen  {status['result'].get('candidate')}")
    for metric in status["result"]["metrics"]:
        if metric["name"] in _SHOWN_METRICS:
            interval = f"  95 % interval [{metric['low']}, {metric['high']}]" if "low" in metric else ""
            print(f"  {metric['name']:<14} {metric['value']}{interval}")
    _say("events")
    print(kubectl("-n", _NAMESPACE, "events", "--for", "finetunejob/emoji"), end="")


def _predict(model: Path, pictures: Path) -> None:
    """Label a few pictures that the model has never seen: those of its test split."""
    _say("predictions for pictures that were held out")
    with (model / "splits.csv").open(encoding="utf-8", newline="") as table:
        held_out = [row["path"] for row in csv.DictReader(table) if row["split"] == "test"]
    chosen = [str(pictures / name) for name in held_out[:: len(held_out) // _NUM_PREDICTIONS][:_NUM_PREDICTIONS]]
    trainer = Path(sys.executable).with_name("finetune-trainer")
    subprocess.run([str(trainer), "predict", str(model), *chosen], check=True)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
