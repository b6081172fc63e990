"""OCI manifests."""

import json

from localcluster.oci import blob_digests


def test_blobs_are_the_configuration_then_the_layers_none_twice() -> None:
    layers = [{"digest": "sha256:b"}, {"digest": "sha256:c"}, {"digest": "sha256:b"}]
    manifest = json.dumps({"config": {"digest": "sha256:a"}, "layers": layers}).encode()

    assert blob_digests(manifest) == ("a", "b", "c")
