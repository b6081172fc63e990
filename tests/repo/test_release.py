"""What `make release-check` finds wrong, and the bill of materials that it writes."""

import tomllib
from typing import Any

import pytest
import release_check
from packaging.requirements import Requirement
from release_rules import (
    find_foreign_licences,
    find_risky_code,
    find_unlocked,
    find_unpinned_image,
    is_allowed,
    read_licence,
    read_requirements,
)
from release_sbom import build_sbom, select_packages

_EXPORT = """\
aiohttp==3.14.5 ; sys_platform == 'linux' \\
    --hash=sha256:00 \\
    --hash=sha256:01
# via kopf
attrs==1.0 \\
    --hash=sha256:02
"""


def test_requirements_are_read_with_their_hashes() -> None:
    (first, second) = read_requirements(_EXPORT)

    assert ("aiohttp", "==3.14.5", 2) == (first[0].name, str(first[0].specifier), first[1])
    assert ("attrs", 1) == (second[0].name, second[1])
    assert [] == find_unlocked((first, second))


@pytest.mark.parametrize(
    ("requirement", "hashes", "expected"),
    [
        pytest.param("attrs==1", 0, "attrs==1: no hash", id="no hash"),
        pytest.param("attrs>=1", 1, "attrs>=1: not one version", id="a range"),
        pytest.param("attrs", 1, "attrs: not one version", id="no version"),
        pytest.param(
            "attrs @ https://host.test/attrs.whl", 1, "attrs @ https://host.test/attrs.whl: not one version", id="a URL"
        ),
    ],
)
def test_what_is_not_locked_is_found(requirement: str, hashes: int, expected: str) -> None:
    assert [expected] == find_unlocked([(Requirement(requirement), hashes)])


def test_a_base_image_needs_a_digest() -> None:
    assert [] == find_unpinned_image(f"registry.test/python@sha256:{'0' * 64}")
    assert ["base image python:3.11-slim: give it as NAME@sha256:DIGEST"] == find_unpinned_image("python:3.11-slim")


@pytest.mark.parametrize(
    ("expression", "text", "classifiers", "expected"),
    [
        pytest.param("MIT", "anything", [], "MIT", id="an expression"),
        pytest.param(None, "Apache 2.0", [], "Apache-2.0", id="a text"),
        pytest.param(None, "", ["License :: OSI Approved :: BSD License"], "BSD-3-Clause", id="a classifier"),
        pytest.param(None, "The MIT licence\nof ...", ["License :: OSI Approved :: MIT License"], "MIT", id="the known words"),
        pytest.param(None, "UNKNOWN", [], "", id="none"),
        pytest.param(None, "GPL-3.0", [], "GPL-3.0", id="a foreign one"),
    ],
)
def test_licence_of_a_package(expression: str | None, text: str, classifiers: list[str], expected: str) -> None:
    assert expected == read_licence(expression=expression, text=text, classifiers=classifiers)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("Apache-2.0 AND (MIT OR Zlib)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only OR MIT", True),
        ("GPL-2.0-only AND MIT", False),
        ("LicenseRef-NVIDIA-Proprietary", False),
        ("", False),
    ],
)
def test_licences_that_are_allowed(expression: str, *, expected: bool) -> None:
    assert expected == is_allowed(expression)


def test_foreign_licences_need_an_exception_by_name() -> None:
    licences = {"attrs": "MIT", "nvidia-cublas": "LicenseRef-NVIDIA-Proprietary", "readline": "GPL-3.0", "odd": ""}

    assert [
        "odd: licence unknown is not on the list",
        "readline: licence GPL-3.0 is not on the list",
    ] == find_foreign_licences(licences)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", "imports pickle"),
        ("from dill import loads", "imports dill"),
        ("def f():\n    import marshal.x", "imports marshal"),
        ("torch.load(path)", "calls torch.load without weights_only=True"),
        ("torch.load(path, weights_only=safe)", "calls torch.load without weights_only=True"),
        ("yaml.load(text)", "calls yaml.load"),
        ("eval(text)", "calls eval"),
        ("os.system(text)", "calls os.system"),
        ("subprocess.run(text, shell=True)", "gives shell to subprocess.run"),
        ("AutoModel.from_pretrained(name, trust_remote_code=trusted)", "gives trust_remote_code to AutoModel.from_pretrained"),
    ],
)
def test_risky_code_is_found(source: str, expected: str) -> None:
    (problem,) = find_risky_code(source, path="module.py")

    assert problem.startswith("module.py:")
    assert problem.endswith(f": {expected}")


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "torch.load(path, weights_only=True)", "yaml.safe_load(text)", "subprocess.run(words, shell=False)"],
)
def test_harmless_code_is_let_through(source: str) -> None:
    assert [] == find_risky_code(source, path="module.py")


def test_the_packages_hold_no_risky_code() -> None:
    sources = release_check._list_sources()

    assert len(sources) > 50
    assert [] == [problem for path in sources for problem in release_check._check_source(path)]


_LOCK: dict[str, Any] = {
    "package": [
        {"name": "program", "version": "1", "dependencies": [{"name": "cuda", "extra": ["blas"]}, {"name": "graph"}]},
        {
            "name": "cuda",
            "version": "13",
            "optional-dependencies": {"blas": [{"name": "blas"}], "fft": [{"name": "fft"}]},
            "sdist": {"url": "https://host.test/cuda.tar.gz", "hash": "sha256:0a"},
        },
        {"name": "blas", "version": "2", "dependencies": [{"name": "only-mac", "marker": "sys_platform == 'darwin'"}]},
        {"name": "fft", "version": "2"},
        {"name": "only-mac", "version": "1"},
        {"name": "graph", "version": "3.6", "resolution-markers": ["python_full_version < '3.12'"]},
        {"name": "graph", "version": "3.7", "resolution-markers": ["python_full_version >= '3.12'"]},
    ]
}


def test_packages_of_an_image_follow_extras_markers_and_versions() -> None:
    packages = select_packages(_LOCK, "program", release_check.PLATFORM)

    assert {"program": "1", "cuda": "13", "blas": "2", "graph": "3.6"} == {
        name: each["version"] for name, each in packages.items()
    }


def test_the_bill_names_files_licences_and_dependencies() -> None:
    licences = {"cuda": "In other words", "graph": "MIT OR Apache-2.0"}
    document = build_sbom(_LOCK, "program", platform=release_check.PLATFORM, licences=licences)
    components = {each["name"]: each for each in document["components"]}
    dependencies = {each["ref"]: each["dependsOn"] for each in document["dependencies"]}

    assert ("CycloneDX", "program") == (document["bomFormat"], document["metadata"]["component"]["name"])
    assert ["blas", "cuda", "graph"] == list(components)
    assert [{"license": {"name": "In other words"}}] == components["cuda"]["licenses"]
    assert [{"expression": "MIT OR Apache-2.0"}] == components["graph"]["licenses"]
    assert [{"alg": "SHA-256", "content": "0a"}] == components["cuda"]["externalReferences"][0]["hashes"]
    assert ["pkg:pypi/blas@2"] == dependencies["pkg:pypi/cuda@13"]
    assert ["pkg:pypi/cuda@13", "pkg:pypi/graph@3.6"] == dependencies["pkg:pypi/program@1"]


@pytest.mark.parametrize("image", release_check.IMAGES)
def test_the_bill_of_an_image_has_a_hash_for_every_file(image: str) -> None:
    lock = tomllib.loads((release_check.ROOT / "uv.lock").read_text(encoding="utf-8"))
    document = build_sbom(lock, f"finetune-{image}", platform=release_check.PLATFORM, licences={})
    foreign = [each for each in document["components"] if each["name"] != "finetune-api"]
    hashes = [file["hashes"][0]["content"] for each in foreign for file in each["externalReferences"]]

    assert foreign
    assert ("torch" in {each["name"] for each in foreign}) == (image == "trainer")
    assert all(len(each) == 64 for each in hashes)
