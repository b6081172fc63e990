"""A bill of materials of an image, in CycloneDX's JSON, from the lock file (pure)."""

import re
from collections.abc import Mapping
from typing import Any

from packaging.markers import Marker

# The images hold this platform; a lock has others as well.
Platform = Mapping[str, str]
Lock = Mapping[str, Any]


def select_packages(lock: Lock, root: str, platform: Platform) -> dict[str, dict[str, Any]]:
    """Return the locked packages, by name, that an installation of `root` has on a platform."""
    found: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [(root, ())]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extras = waiting.pop()
        package = found.setdefault(name, _find(lock, name, platform))
        parts = [("", package.get("dependencies", ())), *((each, package["optional-dependencies"][each]) for each in extras)]
        for extra, dependencies in parts:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(each["name"], tuple(each.get("extra", ()))) for each in _choose(dependencies, platform)]
    return found


def build_sbom(lock: Lock, root: str, *, platform: Platform, licences: Mapping[str, str]) -> dict[str, Any]:
    """Return the document; the same lock gives the same text."""
    packages = select_packages(lock, root, platform)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _build_component(packages[root], type="application", licence="Apache-2.0")},
        "components": [
            _build_component(package, type="library", licence=licences.get(name, ""))
            for name, package in sorted(packages.items())
            if name != root
        ],
        "dependencies": [
            {"ref": _purl(package), "dependsOn": _list_references(package, packages, platform)}
            for _, package in sorted(packages.items())
        ],
    }


def _find(lock: Lock, name: str, platform: Platform) -> dict[str, Any]:
    """Return the package of a name; a lock may have several versions for several platforms."""
    candidates = [package for package in lock["package"] if package["name"] == name]
    fitting = [
        package
        for package in candidates
        if len(candidates) == 1 or any(_holds(marker, platform) for marker in package.get("resolution-markers", ()))
    ]
    (package,) = fitting
    return dict(package)


def _choose(dependencies: Any, platform: Platform) -> list[dict[str, Any]]:  # noqa: ANN401  as tomllib gives it
    return [each for each in dependencies if "marker" not in each or _holds(each["marker"], platform)]


def _holds(marker: str, platform: Platform) -> bool:
    return Marker(marker).evaluate(dict(platform))


def _list_references(package: dict[str, Any], packages: Mapping[str, dict[str, Any]], platform: Platform) -> list[str]:
    parts = (package.get("dependencies", ()), *package.get("optional-dependencies", {}).values())
    names = {each["name"] for part in parts for each in _choose(part, platform)}
    return sorted(_purl(packages[name]) for name in names & set(packages))


def _build_component(package: dict[str, Any], *, type: str, licence: str) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": type,
        "bom-ref": _purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": _purl(package),
    }
    if licence:
        component["licenses"] = [_describe_licence(licence)]
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
    if files:
        component["externalReferences"] = [
            {"type": "distribution", "url": each["url"], "hashes": [{"alg": "SHA-256", "content": each["hash"][7:]}]}
            for each in files
        ]
    return component


def _describe_licence(licence: str) -> dict[str, Any]:
    """Return what CycloneDX has for a licence: an expression of SPDX, or a name in other words."""
    is_expression = re.fullmatch(r"[A-Za-z0-9.()-]+( (AND|OR|WITH) [A-Za-z0-9.()-]+)*", licence)
    return {"expression": licence} if is_expression else {"license": {"name": licence}}


def _purl(package: dict[str, Any]) -> str:
    return f"pkg:pypi/{package['name']}@{package['version']}"
