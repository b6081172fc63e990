"""OCI images as tar archives that hold no more than containerd lacks."""

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from localcluster.containers import content_folder, ctr
from localcluster.errors import ClusterError
from localcluster.shell import run, try_run

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


def has_image(reference: str) -> bool:
    """Say whether containerd holds an image under a name."""
    return bool(try_run([*ctr(), "images", "list", "--quiet", f"name=={reference}"]).stdout.strip())


def import_image(manifest: bytes, *, blobs: Path, reference: str, is_present: Callable[[str], bool]) -> int:
    """Import an image under a name, sending its manifest and the blobs that are absent, and return the bytes sent."""
    descriptor = _descriptor(MANIFEST_TYPE, manifest)
    # containerd reads the configuration from the archive even where it holds it.
    config, *layers = blob_digests(manifest)
    wanted = [config, *(digest for digest in layers if not is_present(digest))]

    def write(stream: IO[bytes]) -> None:
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            _add_index(archive, descriptor, reference=reference)
            _add_bytes(archive, f"blobs/sha256/{_digest(manifest)}", manifest)
            for digest in wanted:
                archive.add(blobs / digest, arcname=f"blobs/sha256/{digest}")

    _import_archive(write)
    return sum((blobs / digest).stat().st_size for digest in wanted)


def import_single_program(program: Path, *, reference: str) -> None:
    """Import an image that holds one static program and nothing else."""
    layer = _layer_of(program)
    config = _json_bytes(
        {
            "architecture": ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_digest(layer)}"]},
        }
    )
    manifest = _json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor(CONFIG_TYPE, config),
            "layers": [_descriptor(LAYER_TYPE, layer)],
        }
    )

    _import_blobs(manifest, blobs=(config, layer), reference=reference)


def import_on_top(layer: bytes, *, base: str, entrypoint: Sequence[str], reference: str) -> None:
    """Import an image that is one which containerd holds, with one layer more and another program to start."""
    listed = run([*ctr(), "images", "list", f"name=={base}"]).splitlines()[-1]
    manifest = json.loads(_read_blob(listed.split()[2]))
    below = json.loads(_read_blob(manifest["config"]["digest"]))
    diff_ids = [*below["rootfs"]["diff_ids"], f"sha256:{_digest(layer)}"]
    changed = {
        "config": {**below["config"], "Entrypoint": list(entrypoint), "Cmd": []},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    config = _json_bytes({key: value for key, value in below.items() if key != "history"} | changed)
    parts = {"config": _descriptor(CONFIG_TYPE, config), "layers": [*manifest["layers"], _descriptor(LAYER_TYPE, layer)]}
    _import_blobs(_json_bytes(manifest | parts), blobs=(config, layer), reference=reference)


def blob_digests(manifest: bytes) -> tuple[str, ...]:
    """Return the hexadecimal digests of an image's configuration and then of its layers, none twice."""
    value = json.loads(manifest)
    parts = (value["config"], *value["layers"])
    return tuple(dict.fromkeys(str(part["digest"]).removeprefix("sha256:") for part in parts))


def _import_blobs(manifest: bytes, *, blobs: Iterable[bytes], reference: str) -> None:
    def write(stream: IO[bytes]) -> None:
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            _add_index(archive, _descriptor(MANIFEST_TYPE, manifest), reference=reference)
            for blob in (manifest, *blobs):
                _add_bytes(archive, f"blobs/sha256/{_digest(blob)}", blob)

    _import_archive(write)


def _read_blob(digest: str) -> bytes:
    return (content_folder() / digest.removeprefix("sha256:")).read_bytes()


def _import_archive(write: Callable[[IO[bytes]], None]) -> None:
    with subprocess.Popen(
        [*ctr(), "images", "import", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write(process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass
        output = process.stdout.read().decode(errors="replace")
    if process.returncode != 0:
        raise ClusterError(f"containerd does not take the image:\n{output}")


def _add_index(archive: tarfile.TarFile, descriptor: dict[str, Any], *, reference: str) -> None:
    named = {**descriptor, "annotations": {"io.containerd.image.name": reference}}
    _add_bytes(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    _add_bytes(archive, "index.json", _json_bytes({"schemaVersion": 2, "manifests": [named]}))


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = mode
    archive.addfile(member, io.BytesIO(content))


def _layer_of(program: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        _add_bytes(archive, program.name, program.read_bytes(), mode=0o755)
    return buffer.getvalue()


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{_digest(content)}", "size": len(content)}


def _json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
