"""Fills a folder with the wheels that the bench needs on a machine that has torch and no network.

`python -m tools.bench.wheels FOLDER`, on a machine with network where sdlora and peft are installed: the very versions
that are here, for another Python or processor if need be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("sdlora", "peft")
PRESENT = frozenset({"torch"})
"""Is there already, built for the GPU, with all that it needs itself."""
GLIBC = ("2_28", "2_27", "2_17", "2_5")
"""Versions that wheels are built for; pip matches their names exactly."""


def needed(python: str, present: Iterable[str] = ()) -> dict[str, str]:
    """Returns what sdlora and the reference loop need, without torch and what only torch needs: name -> version here.

    Args:
        python: version of the other machine's Python, e.g. 3.12.
        present: what else is there already, in versions that will do.
    """
    there = PRESENT | {canonicalize_name(name) for name in present}
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    found: dict[str, str] = {}
    waiting: list[str] = list(ROOTS)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in there:
            continue
        package = metadata.distribution(name)
        found[name] = package.version
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                waiting.append(requirement.name)
    del found["sdlora"]
    return found


def download(folder: Path, packages: Mapping[str, str], python: str, machine: str) -> None:
    """Downloads wheels with pip.

    Args:
        folder: is made.
        packages: name -> version.
        python: e.g. 3.12.
        machine: the processor's kind, e.g. x86_64.
    """
    platforms = [f"--platform=manylinux_{version}_{machine}" for version in GLIBC]
    platforms += [f"--platform=manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    target = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    wanted = [f"{name}=={version}" for name, version in sorted(packages.items())]
    subprocess.run([sys.executable, "-m", "pip", "download", *target, f"--dest={folder}", *wanted], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the other machine's Python (default: 3.12)")
    parser.add_argument("--machine", default="x86_64", help="the other machine's processor (default: x86_64)")
    parser.add_argument("--without", default="", help="packages that are there already, with commas between")
    options = parser.parse_args()
    packages = needed(options.python, filter(None, options.without.split(",")))
    download(options.folder, packages, options.python, options.machine)


if __name__ == "__main__":
    main()
