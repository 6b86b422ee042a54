"""vLLM for a lent Hopper GPU in one file of 44 MB: `python -m benchmarks.gpu.pack 0.33.0`.

Of the compiled files of vLLM's CUDA wheel it keeps the library that is always imported and
FlashAttention 3, without which model code cannot be imported, and in them the code for one GPU
architecture; the rest (other GPUs, other attention, experts, the Rust server, C++ headers) stays
behind. What vLLM imports beyond the packages of the lent machines' image is in `carried.txt`.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from benchmarks.wheel import Wheel, wheel_url

HERE = Path(__file__).parent
LIBRARIES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
TEXTS = (".py", ".json", ".jinja", ".txt", ".typed")
PYTHON = "3.12"
PLATFORMS = ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in (17, 24, 26, 27, 28, 31)))
ARCHITECTURE = 90
_CONTAINER = struct.pack("<IHH", 0xBA55ED50, 1, 16)
"""A CUDA fat binary begins so: magic number, version, size of the header."""
_PTX, _CUBIN = 1, 2


def is_kept(member: str) -> bool:
    """Whether a member of the wheel travels."""
    path = PurePosixPath(member)
    return member in LIBRARIES or path.suffix in TEXTS or ".dist-info" in path.parts[0]


def for_one_gpu(library: bytes, architecture: int = ARCHITECTURE) -> bytes:
    """Leaves the code for one GPU in a library's fat binaries; containers keep their places.

    Zeros, which pack to nothing, stand where the rest was. A container keeps its machine code for
    the architecture, or where it has none, the newest PTX that can be compiled for it; one
    without either stays as it is. Raises ValueError for an element of unknown form.
    """
    smaller = bytearray(library)
    place = library.find(_CONTAINER)
    while place >= 0:
        begin = element = place + len(_CONTAINER) + 8
        (size,) = struct.unpack_from("<Q", library, begin - 8)
        elements = []
        while element < begin + size:
            kind, _, header, length = struct.unpack_from("<HHIQ", library, element)
            (made_for,) = struct.unpack_from("<I", library, element + 28)
            elements.append((kind, made_for, library[element : element + header + length]))
            element += header + length
            if header < 32 or element > begin + size:
                raise ValueError(f"no CUDA fat binary as known here at byte {place}")
        kept = [e for e in elements if e[:2] == (_CUBIN, architecture)]
        fitting = [e for e in elements if e[0] == _PTX and e[1] <= architecture]
        kept = kept or sorted(fitting, key=lambda e: e[1])[-1:] or elements  # none is for this GPU
        content = b"".join(code for _, _, code in kept)
        struct.pack_into("<Q", smaller, begin - 8, len(content))
        smaller[begin : begin + size] = content.ljust(size, b"\0")
        place = library.find(_CONTAINER, begin + size)
    return bytes(smaller)


def strip(archive: zipfile.ZipFile, target: Path) -> None:
    """Writes the members that travel."""
    with zipfile.ZipFile(target, "w") as stripped:
        for member in filter(is_kept, archive.namelist()):
            content = archive.read(member)
            stripped.writestr(member, for_one_gpu(content) if member in LIBRARIES else content)


def install(wheel: Path, site: Path) -> None:
    """Puts a wheel and the packages of `carried.txt` into a folder, for that machine's Python."""
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    pip += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms]
    pip += [f"--target={site}", f"--requirement={HERE / 'carried.txt'}", str(wheel)]
    subprocess.run(pip, check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="of vLLM")
    parser.add_argument("--to", type=Path, default=HERE / "wheels", metavar="FOLDER")
    arguments = parser.parse_args()
    packed = arguments.to / "site.tar.xz"
    packed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder, PurePosixPath(wheel_url(arguments.version)).name)
        strip(Wheel(arguments.version).archive, wheel)
        install(wheel, Path(folder, "site"))
        with tarfile.open(packed, "w:xz") as archive:
            archive.add(Path(folder, "site"), ".")
    print(f"{packed.stat().st_size / 2**20:.1f} MiB  {packed}")


if __name__ == "__main__":
    main()
