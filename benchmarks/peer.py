"""Build the environment the peer runs in: `python -m benchmarks.peer [FOLDER]`.

llama-cpp-python is compiled from its source distribution for this machine's own processor, which takes a C++ compiler
and minutes; a prebuilt wheel would run without the instructions that its best figures need.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from greenroom import environment
from greenroom.errors import ConfigError, GreenroomError

PACKAGE = "llama-cpp-python"
_CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"


def default_folder() -> Path:
    """Where the environment is unless told otherwise."""
    return environment.cache_folder() / "benchmarks" / "llama-cpp"


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def check(python: Path) -> None:
    """Raise ConfigError unless `python` has llama_cpp."""
    try:
        done = subprocess.run([python, "-c", "import llama_cpp, numpy"], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"cannot run {python} ({error.strerror}): {how()}") from error
    if done.returncode:
        raise ConfigError(f"{python} has no llama_cpp that works ({done.stderr.strip().splitlines()[-1]}): {how()}")


def how() -> str:
    """The remedy, for messages."""
    return "build it with `python -m benchmarks.peer`, or give --peer an interpreter that has it"


def build(folder: Path) -> Path:
    """Make the environment and return its interpreter. Raises ConfigError where it cannot be built."""
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError(f"no C++ compiler to build {PACKAGE} with: install g++ or clang, and cmake")
    print(f"building {PACKAGE} in {folder}: minutes", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    command = [str(python_of(folder)), "-m", "pip", "install", "--no-cache-dir", "--no-binary", PACKAGE, PACKAGE]
    flags = {"CMAKE_ARGS": _CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    if subprocess.run(command, env={**os.environ, **flags}).returncode:
        raise ConfigError(f"{PACKAGE} could not be built; pip says why above")
    check(python_of(folder))
    return python_of(folder)


def main() -> int:
    """Build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="default: the cache folder")
    try:
        print(build(parser.parse_args().folder))
    except GreenroomError as error:
        print(f"benchmarks.peer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
