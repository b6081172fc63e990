"""Check what a release is made of, and write a bill of materials for each image: `make release-check`."""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from release_rules import (
    find_foreign_licences,
    find_risky_code,
    find_unlocked,
    find_unpinned_image,
    read_licence,
    read_requirements,
)
from release_sbom import build_sbom

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ("operator", "trainer")
# What the images run on; the environment of this program must be the same for its licences to be known.
PLATFORM = {
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def main() -> int:
    """Print what is wrong, or what was checked and where the bills of materials are."""
    options = _build_parser().parse_args()
    requirements = [each for image in IMAGES for each in read_requirements(_export(options.uv, image))]
    licences = _read_licences(requirement for requirement, _ in requirements)
    sources = _list_sources()
    problems = [
        *find_unlocked(requirements),
        *find_foreign_licences(licences),
        *(problem for path in sources for problem in _check_source(path)),
        *(find_unpinned_image(options.base_image) if options.base_image else ()),
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    print(f"{len(licences)} packages: each of one version, with hashes and a licence of the list or a named exception")
    print(f"{len(sources)} modules without unpickling, evaluation, shells and code from models")
    print(f"base image: {options.base_image or 'not checked; give BASE_IMAGE=NAME@sha256:DIGEST, as to the build'}")
    for path in write_sboms(options.output, licences):
        print(f"wrote {path}")
    return 0


def write_sboms(folder: Path, licences: dict[str, str]) -> list[Path]:
    """Write the bill of materials of each image, and return the paths."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    paths, listed = [], set()
    for image in IMAGES:
        path = folder / f"finetune-{image}.cdx.json"
        document = build_sbom(lock, f"finetune-{image}", platform=PLATFORM, licences=licences)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        paths.append(path)
        listed |= {component["name"] for component in document["components"]}
    assert listed - {"finetune-api"} == set(licences), "uv installs other packages than the bills of materials have"
    return paths


def _export(uv: str, image: str) -> str:
    """Return the requirements of an image as its build makes them."""
    words = ("export", "--quiet", "--frozen", "--no-dev", "--no-header", "--no-annotate", "--no-emit-workspace")
    command = [uv, *words, "--package", f"finetune-{image}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _read_licences(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return the licence of each package that is installed here, as its metadata name it."""
    licences = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate():
            metadata = importlib.metadata.metadata(requirement.name)
            classifiers = metadata.get_all("Classifier") or ()
            expression, text = ((metadata.get_all(field) or [None])[0] for field in ("License-Expression", "License"))
            name = str(canonicalize_name(requirement.name))
            licences[name] = read_licence(expression=expression, text=text, classifiers=classifiers)
    return licences


def _list_sources() -> list[Path]:
    return sorted(path for package in ("api", "operator", "trainer") for path in (ROOT / package).glob("finetune_*/**/*.py"))


def _check_source(path: Path) -> list[str]:
    return find_risky_code(path.read_text(encoding="utf-8"), path=str(path.relative_to(ROOT)))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the program uv (default: %(default)s)")
    parser.add_argument("--base-image", help="the base image of the build, which then must have a digest")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the bills of materials")
    return parser


if __name__ == "__main__":
    sys.exit(main())
