"""Build the project's images and hand them to the node's containerd."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from localcluster.cluster import up_containerd
from localcluster.containers import content_folder, ctr, is_containerd_running, unmount_below
from localcluster.files import write_json, write_text
from localcluster.locks import is_locked, locked
from localcluster.oci import blob_digests, has_image, import_image
from localcluster.packages import BUILD_PACKAGES, NODE_PACKAGES, ensure_packages
from localcluster.paths import IMAGES_FILE, MACHINE, WORK_TREE, Instance, cache_folder
from localcluster.shell import run, say, try_run

NAMES = ("operator", "trainer")
BASE_IMAGE = "localhost/finetune-base:bookworm-1"
BASE_SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
BASE_JUNK = ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/man", "usr/share/locale")
SHARED_INPUTS = ("Dockerfile", ".dockerignore", "uv.lock", "pyproject.toml", "api")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
IMAGES_LOCK = cache_folder() / "images.lock"
NUM_KEPT_IMAGES = 2


def ensure_images(instance: Instance, *, names: Sequence[str]) -> None:
    """Build and import the images whose inputs changed, and write down the names to use."""
    if not is_containerd_running():
        up_containerd(instance)
    references = {name: image_reference(WORK_TREE, name) for name in names}
    missing = [name for name in names if not has_image(references[name])]
    if missing:
        ensure_packages({**NODE_PACKAGES, **BUILD_PACKAGES})
        with locked(IMAGES_LOCK):
            _remove_halves()
            _ensure_base_image()
            for name in missing:
                references[name] = _build(name)
                _import(name, references[name])
            _prune_builds()
    _write_references(references)


def clean_builds() -> None:
    """Remove what a build that was ended in the middle left, unless a build is running."""
    if shutil.which("buildah") is None or not _build_root().exists() or is_locked(IMAGES_LOCK):
        return
    with locked(IMAGES_LOCK):
        _remove_halves()
        unmount_below(_build_root())


def image_reference(tree: Path, name: str) -> str:
    """Return the name of an image, whose tag is a hash of all that it is built from."""
    digest = hashlib.sha256(BASE_IMAGE.encode())
    other = next(other for other in NAMES if other != name)
    inputs = (*SHARED_INPUTS, name, f"{other}/pyproject.toml")
    for path in sorted(_files(tree / part for part in inputs)):
        digest.update(path.relative_to(tree).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"docker.io/library/finetune-{name}:{digest.hexdigest()[:12]}"


def outdated_references(references: Iterable[str], *, name: str, current: str) -> tuple[str, ...]:
    """Return the references to drop, given all in the order of their creation: only the last few of an image stay."""
    own = [reference for reference in references if f"/finetune-{name}:" in reference and reference != current]
    return tuple(own[: -(NUM_KEPT_IMAGES - 1)])


def _files(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_file():
            yield root
            continue
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield path


def _build(name: str) -> str:
    """Build an image from inputs that did not change meanwhile, and return its reference."""
    command: list[str | Path] = [
        *_buildah(),
        "build",
        "--layers",
        "--isolation",
        "chroot",
        "--network",
        "host",
        *_build_flags(name),
        WORK_TREE,
    ]
    while True:
        reference = image_reference(WORK_TREE, name)
        with _timed(f"building {name}"):
            run(command)
        if image_reference(WORK_TREE, name) == reference:
            return reference
        say("the work tree changed meanwhile")


def _import(name: str, reference: str) -> None:
    local = _local_name(name)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".export-") as folder, _timed(f"importing {name}"):
        present = _present_digests()
        manifest, blobs = _export(local, Path(folder), present=present)
        num_bytes = import_image(manifest, blobs=blobs, reference=reference, is_present=present.__contains__)
        say(f"sent {num_bytes / 1e6:.1f} MB to containerd")
    _remember(name, reference, config=blob_digests(manifest)[0])


def _local_name(name: str) -> str:
    return f"localhost/finetune-{name}:dev"


def _build_flags(name: str) -> tuple[str, ...]:
    flags = ("--quiet", "--target", name, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "--tag", _local_name(name))
    if not CA_BUNDLE.exists():
        return flags
    # Mounted for the time of the build alone: the machine's authorities must not end up in an image.
    return (*flags, "--build-arg", f"SSL_CERT_FILE={CA_BUNDLE}", "--volume", f"{CA_BUNDLE.parent}:{CA_BUNDLE.parent}:ro")


def _present_digests() -> frozenset[str]:
    listed = run([*ctr(), "content", "list", "--quiet"]).split()
    return frozenset(digest.removeprefix("sha256:") for digest in listed)


def _export(local: str, folder: Path, *, present: frozenset[str]) -> tuple[bytes, Path]:
    """Write an image's blobs to a folder and return its manifest and where they lie."""
    image = json.loads(run([*_buildah(), "inspect", "--type", "image", local]))
    layers = [str(digest).removeprefix("sha256:") for digest in image["OCIv1"]["rootfs"]["diff_ids"]]
    if len([digest for digest in layers if digest not in present]) <= 1:
        return _export_last_layer(local, folder, present=present.intersection(layers))
    # Layers as plain tar, which costs a fraction of the time that compressing gigabytes would take.
    run([*_buildah(), "push", "--quiet", "--disable-compression", local, f"dir:{folder}"])
    return (folder / "manifest.json").read_bytes(), folder


def _export_last_layer(local: str, folder: Path, *, present: frozenset[str]) -> tuple[bytes, Path]:
    """Write the one layer that containerd lacks: buildah leaves out what it finds in the folder, here linked into it."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest in present:
        os.link(content_folder() / digest, blobs / digest)
    run([*_buildah(), "push", "--quiet", local, f"oci:{folder}:image"])
    descriptor = json.loads((folder / "index.json").read_text())["manifests"][0]
    return (blobs / str(descriptor["digest"]).removeprefix("sha256:")).read_bytes(), blobs


def _ensure_base_image() -> None:
    if try_run([*_buildah(), "inspect", "--type", "image", BASE_IMAGE]).returncode == 0:
        return
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".base-") as folder, _timed("building the base image"):
        root = Path(folder) / "root"
        run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", BASE_SUITE, root])
        for junk in BASE_JUNK:
            shutil.rmtree(root / junk, ignore_errors=True)
        # debootstrap copies the machine's own.
        (root / "etc/resolv.conf").write_text("")
        (root / "etc/hostname").unlink(missing_ok=True)
        container = run([*_buildah(), "from", "scratch"]).strip()
        run([*_buildah(), "add", "--quiet", container, root, "/"])
        run([*_buildah(), "config", "--env", "LANG=C.UTF-8", container])
        run([*_buildah(), "commit", "--quiet", "--rm", container, BASE_IMAGE])


def _remove_halves() -> None:
    """Remove exports, base systems and containers of a build that did not come to its end."""
    for pattern in (".export-*", ".base-*"):
        for folder in cache_folder().glob(pattern):
            shutil.rmtree(folder)
    if run([*_buildah(), "containers", "--quiet"]).split():
        try_run([*_buildah(), "rm", "--all"])


def _prune_builds() -> None:
    """Leave nothing mounted, and, once the dependencies changed, drop the layers of the older ones."""
    unmount_below(_build_root())
    key = hashlib.sha256((WORK_TREE / "uv.lock").read_bytes()).hexdigest()
    remembered = cache_folder() / "buildah" / "lock-key"
    if remembered.exists() and remembered.read_text() != key:
        try_run([*_buildah(), "rmi", "--prune"])
    write_text(remembered, key)


def _remember(name: str, reference: str, *, config: str) -> None:
    """Note an image in the order of creation, and drop those that are older than the last few."""
    path = cache_folder() / "imported.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    known.pop(reference, None)
    known[reference] = config
    outdated = outdated_references(known, name=name, current=reference)
    kept = {reference: config for reference, config in known.items() if reference not in outdated}
    # The kubelet's view of an image is a second name, made of its configuration's digest; it would keep the layers.
    second_names = {f"sha256:{known[reference]}" for reference in outdated if known[reference] not in kept.values()}
    if outdated:
        try_run([*ctr(), "images", "remove", *outdated, *second_names])
    write_json(path, kept)


def _write_references(references: Mapping[str, str]) -> None:
    known: dict[str, str] = json.loads(IMAGES_FILE.read_text()) if IMAGES_FILE.exists() else {}
    known.update(references)
    if not IMAGES_FILE.exists() or json.loads(IMAGES_FILE.read_text()) != known:
        write_json(IMAGES_FILE, known)
    for name, reference in references.items():
        say(f"{name}: {reference}")


def _buildah() -> list[str]:
    return ["buildah", "--root", str(_build_root()), "--runroot", str(MACHINE / "buildah"), "--storage-driver", "overlay"]


def _build_root() -> Path:
    return cache_folder() / "buildah" / "root"


@contextmanager
def _timed(what: str) -> Iterator[None]:
    say(f"{what} ...")
    since = time.monotonic()
    yield
    say(f"{what} took {time.monotonic() - since:.1f} s")
