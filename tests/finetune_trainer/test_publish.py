import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.publish import Artefact, publish, read_published


def make_artefact(run: str = "r1", **metrics: Any) -> Artefact:
    result = {"candidate": "probe", "metrics": [{"name": "test_accuracy", "value": "0.9"}]}
    return Artefact(
        {"w": torch.zeros(2)}, {"labels": ["a"]}, {"result": result, **metrics}, "path,label,split\n", "card", {"run": run}
    )


def test_digest_of_the_output_covers_every_file(tmp_path: Path) -> None:
    output = publish(tmp_path, make_artefact(), uri="pvc://models/x")

    manifest = (tmp_path / "manifest.json").read_bytes()
    assert output.digest == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    assert output.bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "COMPLETE")
    for name, entry in json.loads(manifest)["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == entry["sha256"]


def test_published_result_is_read_back(tmp_path: Path) -> None:
    output = publish(tmp_path, make_artefact(), uri="pvc://models/x")

    published = read_published(tmp_path, run="r1", uri="pvc://models/x")

    assert published is not None
    assert published.output == output
    assert published.result.metrics[0].value == "0.9"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "COMPLETE").unlink(), id="not complete"),
        pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(b""), id="weights cut"),
        pytest.param(lambda folder: (folder / "manifest.json").write_text("{}"), id="other manifest"),
        pytest.param(lambda folder: publish(folder, make_artefact(run="r2"), uri="pvc://models/x"), id="another run"),
    ],
)
def test_anything_but_this_runs_complete_artefact_is_not_taken_for_it(tmp_path: Path, damage: Any) -> None:
    publish(tmp_path, make_artefact(), uri="pvc://models/x")

    damage(tmp_path)

    assert read_published(tmp_path, run="r1", uri="pvc://models/x") is None


def test_complete_never_stands_beside_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, make_artefact(), uri="pvc://models/x")

    def crash(*_: Any) -> None:
        raise OSError("the machine stops here")

    monkeypatch.setattr("finetune_trainer.publish.sync_folder", crash)
    with pytest.raises(OSError, match="stops here"):
        publish(tmp_path, make_artefact(run="r2"), uri="pvc://models/x")

    assert not (tmp_path / "COMPLETE").exists()
