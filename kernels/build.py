"""`python -m kernels.build`: compile the native CPU kernels, one library an instruction set.

Without a C++ compiler nothing is built and the torch kernels serve: slower, with the same guarantees.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
# Beside what is installed, not beside the sources: a copy of these that a job brings along finds the same libraries.
SCHEMES = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
PLACES = tuple(Path(sysconfig.get_path("data", scheme)) / "share" / "shoal" for scheme in SCHEMES)

# A contraction that the compiler makes in a loop's body and not in its tail would give equal numbers unequal bits.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}


class BuildError(Exception):
    """The compiler refused; the message is its own."""


def buildable() -> tuple[str, ...]:
    """Instruction sets that are built for this machine's architecture, the fastest first."""
    return tuple(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def library(instruction_set: str) -> Path | None:
    """The library of one instruction set, None where it was not built; a stale one has another name."""
    name = library_name(instruction_set)
    return next((place / name for place in PLACES if (place / name).is_file()), None)


def library_name(instruction_set: str) -> str:
    """It follows the sources and how they are compiled."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(" ".join((*FLAGS, *INSTRUCTION_SETS[instruction_set])).encode())
    return f"shoal-{digest.hexdigest()[:16]}-{instruction_set}.so"


def compiler() -> str | None:
    """$CXX, g++ or clang++, whichever is there first."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def build(instruction_set: str, cxx: str) -> Path:
    """Compile one library unless it is there; raises BuildError with the compiler's words, or the system's."""
    found = library(instruction_set)
    if found is not None:
        return found
    place = _writable()
    target = place / library_name(instruction_set)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        made = Path(scratch) / target.name
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        command = [cxx, *FLAGS, *INSTRUCTION_SETS[instruction_set], *sources, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr.strip())
        made.replace(target)
    return target


def _writable() -> Path:
    """The first of the places that this user may write to; raises BuildError where there is none."""
    reasons = []
    for place in PLACES:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reasons.append(f"{place}: {error.strerror}")
            continue
        if os.access(place, os.W_OK):
            return place
        reasons.append(f"{place} is not writable")
    raise BuildError("; ".join(reasons))


def main() -> int:
    cxx = compiler()
    if cxx is None:
        print("kernels: no C++ compiler was found, so the slower torch kernels serve; install g++ and build again")
        return 0
    with ThreadPoolExecutor() as pool:
        builds = {name: pool.submit(build, name, cxx) for name in buildable()}
    refusals = {name: error for name, made in builds.items() if (error := made.exception()) is not None}
    for name, error in refusals.items():
        if not isinstance(error, BuildError):
            raise error
        print(f"kernels: {cxx} cannot build {name}\n{error}", file=sys.stderr)
    built = [name for name in builds if name not in refusals]
    print(f"kernels: {', '.join(built) or 'none, so the slower torch kernels serve'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
