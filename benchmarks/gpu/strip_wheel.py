"""A vLLM CUDA wheel for Hopper GPUs that can travel: `python -m benchmarks.gpu.strip_wheel 0.33.0`.

Of the compiled files it keeps the library that vLLM imports always and FlashAttention 3, without
which vLLM's model code cannot be imported; the rest (other GPUs, other attention, experts, the Rust
server, C++ headers) stays behind. The result is cut into pieces, which `run.sh` joins.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path, PurePosixPath

from benchmarks.wheel import Wheel, wheel_url

LIBRARIES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
TEXTS = (".py", ".json", ".jinja", ".txt", ".typed")
WHEELS = Path(__file__).parent / "wheels"
PIECE_BYTES = 58 << 20  # a call to a lent GPU machine carries 64 MiB, the work tree included


def is_kept(member: str) -> bool:
    """Whether a member of the wheel travels."""
    path = PurePosixPath(member)
    return member in LIBRARIES or path.suffix in TEXTS or ".dist-info" in path.parts[0]


def strip(archive: zipfile.ZipFile, target: Path) -> None:
    """Writes the members that travel; libraries with LZMA, which halves them once more."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as stripped:
        for member in filter(is_kept, archive.namelist()):
            packing = zipfile.ZIP_LZMA if member in LIBRARIES else zipfile.ZIP_DEFLATED
            stripped.writestr(member, archive.read(member), compress_type=packing)


def cut(path: Path, piece_bytes: int) -> list[Path]:
    """Replaces a file by its pieces `0/<name>.part0`, `1/<name>.part1`, each a folder to carry."""
    data = path.read_bytes()
    pieces = []
    for index, start in enumerate(range(0, len(data), piece_bytes)):
        pieces.append(path.parent / str(index) / f"{path.name}.part{index}")
        pieces[-1].parent.mkdir(exist_ok=True)
        pieces[-1].write_bytes(data[start : start + piece_bytes])
    path.unlink()
    return pieces


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="of vLLM")
    parser.add_argument("--to", type=Path, default=WHEELS, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    target = arguments.to / PurePosixPath(wheel_url(arguments.version)).name
    strip(Wheel(arguments.version).archive, target)
    for piece in cut(target, PIECE_BYTES):
        print(f"{piece.stat().st_size / 2**20:6.1f} MiB  {piece}")


if __name__ == "__main__":
    main()
