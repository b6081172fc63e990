"""Compile the cluster's programs from Go modules and keep them in a cache."""

import functools
import hashlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from localcluster.environment import child_environment
from localcluster.errors import ClusterError
from localcluster.locks import locked
from localcluster.paths import GO_MODULE, GO_TOOLS_MODULE, KSTATUS_MODULE, KWOK_MODULE, cache_folder
from localcluster.shell import say, tail

KUBERNETES = "v1.34.4"
LINKER_FLAGS = " ".join(
    (
        "-s -w",
        f"-X k8s.io/component-base/version.gitVersion={KUBERNETES}",
        f"-X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES}",
        "-X k8s.io/component-base/version.gitMajor=1",
        "-X k8s.io/component-base/version.gitMinor=34",
    )
)
NO_GO = (
    "go: not found. Install Go 1.26 or later, or use a cluster of your own instead (kind, minikube or any other): "
    "point KUBECONFIG at it, load both images into it and install the chart."
)


@dataclass(frozen=True)
class Program:
    """One program and the Go package it is compiled from."""

    name: str
    package: str
    module: Path = GO_MODULE


CONTROL_PLANE = (
    Program("etcd", "go.etcd.io/etcd/server/v3"),
    Program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    Program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    Program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    Program("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
)
NODE = (
    Program("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    Program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    Program("coredns", "./coredns"),
)
TOOLS = (
    Program("helm", "helm.sh/helm/v3/cmd/helm"),
    Program("etcdctl", "go.etcd.io/etcd/etcdctl/v3"),
)
DOCUMENTATION = (Program("helm-docs", "github.com/norwoodj/helm-docs/cmd/helm-docs", GO_TOOLS_MODULE),)
# Plays the kubelets in load tests, which compile it on first use.
LOAD = (Program("kwok", "sigs.k8s.io/kwok/cmd/kwok", KWOK_MODULE),)
JUDGES = (Program("kstatus", ".", KSTATUS_MODULE),)
CLUSTER = (*CONTROL_PLANE, *NODE, *TOOLS)


def ensure_binaries(programs: tuple[Program, ...] = CLUSTER) -> None:
    """Compile the programs that the cache does not hold yet."""
    if all(binary_path(program).exists() for program in programs):
        return
    with locked(cache_folder() / "binaries.lock"):
        for half in binaries_folder().glob(".*"):
            half.unlink()
        for program in programs:
            if not binary_path(program).exists():
                _compile(program)


def find_program(name: str) -> Program:
    """Return the program with a name."""
    known = {program.name: program for program in (*CLUSTER, *DOCUMENTATION, *LOAD, *JUDGES)}
    if name not in known:
        raise ClusterError(f"{name}: no such program; there are {', '.join(sorted(known))}")
    return known[name]


def binary(name: str) -> str:
    """Return the path of a program, compiling it first where needed."""
    program = find_program(name)
    ensure_binaries((program,))
    return str(binary_path(program))


def binary_path(program: Program) -> Path:
    """Return where the cache keeps a program."""
    return binaries_folder(program.module) / program.name


def binaries_folder(module: Path = GO_MODULE) -> Path:
    """Return the cache folder for what one state of a Go module compiles to."""
    return cache_folder() / "binaries" / module_key(module)


@functools.cache
def module_key(module: Path) -> str:
    """Return a hash of all that decides what a Go module compiles to."""
    digest = hashlib.sha256(LINKER_FLAGS.encode())
    for path in sorted((*module.glob("go.*"), *module.glob("**/*.go"))):
        digest.update(path.relative_to(module).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(program: Program) -> None:
    go = shutil.which("go")
    if go is None:
        raise ClusterError(NO_GO)
    say(f"compiling {program.name} ...")
    since = time.monotonic()
    target = binary_path(program)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    command = [go, "build", "-mod=readonly", "-trimpath", "-ldflags", LINKER_FLAGS, "-o", str(temporary), program.package]
    result = subprocess.run(
        command, cwd=program.module, env=child_environment(CGO_ENABLED="0"), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise ClusterError(f"{program.name} does not compile:\n{tail(result.stderr)}")
    temporary.replace(target)
    say(f"compiled {program.name} in {time.monotonic() - since:.0f} s")
