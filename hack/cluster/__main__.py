"""The local cluster's command line: `python3 hack/cluster COMMAND`."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from localcluster.binaries import CLUSTER, JUDGES, binaries_folder, binary, ensure_binaries
from localcluster.cluster import all_instances, describe, down, up
from localcluster.errors import ClusterError
from localcluster.images import NAMES as IMAGE_NAMES
from localcluster.images import clean_builds, ensure_images
from localcluster.paths import instance_named
from localcluster.prometheus import PROGRAMS as PROMETHEUS
from localcluster.prometheus import ensure_prometheus
from localcluster.volumes import ensure_volume


def main() -> int:
    """Run one command and return the exit status."""
    arguments = _parser().parse_args()
    try:
        _run(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "up":
            instance = instance_named(arguments.name)
            up(instance, mode=arguments.mode, has_audit_log=arguments.audit_log)
            print(instance.kubeconfig)
        case "down":
            _down(arguments)
        case "status":
            print("\n".join(filter(None, map(describe, all_instances()))) or "no cluster")
        case "images":
            ensure_images(instance_named(arguments.name), names=(arguments.only,) if arguments.only else IMAGE_NAMES)
        case "volume":
            instance = instance_named(arguments.name)
            print(ensure_volume(instance, arguments.claim, namespace=arguments.namespace, size=arguments.size))
        case "binaries":
            ensure_binaries(CLUSTER)
            print(binaries_folder())
        case "prepare":
            _prepare(arguments.name)
        case "path":
            find = ensure_prometheus if arguments.program in PROMETHEUS else binary
            print(find(arguments.program))
        case "env":
            _print_environment(arguments.name)


def _down(arguments: argparse.Namespace) -> None:
    for instance in all_instances() if arguments.all else (instance_named(arguments.name),):
        down(instance)
    clean_builds()


def _prepare(name: str) -> None:
    """Compile and build side by side: each waits for the network or a disk while the other computes."""
    with ThreadPoolExecutor() as pool:
        parts = (
            pool.submit(ensure_binaries, (*CLUSTER, *JUDGES)),
            pool.submit(ensure_images, instance_named(name), names=IMAGE_NAMES),
        )
    for part in parts:
        part.result()


def _print_environment(name: str) -> None:
    ensure_binaries(CLUSTER)
    print(f"export KUBECONFIG={instance_named(name).kubeconfig}")
    print(f"export PATH={binaries_folder()}:$PATH")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 hack/cluster", description="A real Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", help="bring a cluster up, or what is missing of it"))
    down_parser = commands.add_parser("down", help="stop a cluster and remove all it made but volumes and logs")
    _add_name(down_parser)
    down_parser.add_argument("--all", action="store_true", help="every cluster of this work tree")
    commands.add_parser("status", help="say what runs")
    images_parser = commands.add_parser("images", help="build both images and import them into the node")
    _add_name(images_parser)
    images_parser.add_argument("--only", choices=IMAGE_NAMES, help="one image alone")
    _add_volume(commands.add_parser("volume", help="make a host directory that pods see through a claim"))
    commands.add_parser("binaries", help="compile the programs that are not in the cache")
    _add_name(commands.add_parser("prepare", help="compile the programs and build the images, side by side"))
    path_parser = commands.add_parser("path", help="print where a program lies, compiling or fetching it if need be")
    path_parser.add_argument("program")
    _add_name(commands.add_parser("env", help="print shell lines that set KUBECONFIG and PATH"))
    return parser


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument(
        "--mode", choices=("control-plane", "node"), default="node", help="with a node that runs pods, or without"
    )
    parser.add_argument("--audit-log", action=argparse.BooleanOptionalAction, default=True, help="log every request")


def _add_volume(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("claim", help="name of the PersistentVolumeClaim")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--size", default="2Gi")


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", type=_cluster_name, default="main", help="name of the cluster")


def _cluster_name(text: str) -> str:
    if Path(text).name != text or not text.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text!r}: give letters, digits, - and _")
    return text


if __name__ == "__main__":
    sys.exit(main())
