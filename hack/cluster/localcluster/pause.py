"""The pause image: one static program that holds a pod's namespaces and reaps its orphans."""

import tempfile
from pathlib import Path

from localcluster.containers import PAUSE_IMAGE
from localcluster.oci import has_image, import_single_program
from localcluster.shell import run

SOURCE = Path(__file__).with_name("pause.c")


def ensure_pause_image() -> None:
    """Build the pause image and import it, unless containerd holds it."""
    if has_image(PAUSE_IMAGE):
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pause"
        run(["gcc", "-static", "-Os", "-s", "-o", program, SOURCE])
        import_single_program(program, reference=PAUSE_IMAGE)
