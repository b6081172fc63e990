"""Run the benchmarks one after the other: `python -m bench [--quick] [NAME ...]`."""

import argparse
import subprocess
import sys

NAMES = ("features", "step", "tasks", "tutorial", "operator", "reports", "leader", "kills")
ON_REQUEST = ("peers", "scale")  # installs another environment; takes a machine for itself


def main() -> int:
    """Run the named benchmarks, each in a process of its own, and return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        default=NAMES,
        metavar="NAME",
        help=f"which of {', '.join(NAMES)}; all these if none is given; or {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--quick", action="store_true", help="show that they run, not how fast it is")
    arguments = parser.parse_args()
    options = ["--quick"] if arguments.quick else []
    failed = [name for name in arguments.names if run(name, options) != 0]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, options: list[str]) -> int:
    """Return the exit status of one benchmark."""
    return subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
