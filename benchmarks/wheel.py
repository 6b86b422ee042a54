"""The files of a vLLM wheel on the package index, without the 300 MB around them.

Members come by HTTP range requests and stay in the user's cache, so a second run needs no network.
`python -m benchmarks.wheel 0.33.0` says what the wheel's size is made of.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from html import unescape
from pathlib import PurePosixPath
from urllib.parse import urldefrag, urljoin
from urllib.request import Request, urlopen

from benchmarks.gemma import default_cache_dir

PYPI = "https://pypi.org/simple"
PLATFORM = "x86_64"
READ_AHEAD = 1 << 18
TIMEOUT = 60


class RangedFile(io.RawIOBase):
    """A file on a server that honours range requests; OSError where the server does not."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, 0
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._place + len(buffer), self._size)
        if self._place >= stop:
            return 0
        asked = Request(self._url, headers={"Range": f"bytes={self._place}-{stop - 1}"})
        with urlopen(asked, timeout=TIMEOUT) as answer:
            if answer.status != 206:
                raise OSError(f"{self._url} is not served in ranges (HTTP {answer.status})")
            data = answer.read()
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def wheel_url(version: str) -> str:
    """Where the index that pip uses ($PIP_INDEX_URL, else PyPI) has the wheel of this version."""
    index = os.environ.get("PIP_INDEX_URL", PYPI).rstrip("/") + "/vllm/"
    with urlopen(index, timeout=TIMEOUT) as page:
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    for link in links:
        url = urldefrag(urljoin(index, unescape(link))).url
        if f"/vllm-{version}-" in url and url.endswith(f"{PLATFORM}.whl"):
            return url
    raise OSError(f"{index} lists no {PLATFORM} wheel of vllm {version}")


class Wheel:
    """One wheel; OSError where a member is neither cached nor to be had."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._folder = default_cache_dir() / f"vllm-{version}-{PLATFORM}"

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        file = RangedFile(wheel_url(self._version))
        return zipfile.ZipFile(io.BufferedReader(file, READ_AHEAD))

    @cached_property
    def names(self) -> frozenset[str]:
        """Paths of all members."""
        listing = self._cached("members.txt", lambda: "\n".join(self.archive.namelist()).encode())
        return frozenset(listing.decode().splitlines())

    def read(self, path: str) -> str | None:
        """A member's text; None if there is no such member."""
        if path not in self.names:
            return None
        return self._cached(path, lambda: self.archive.read(path)).decode()

    def _cached(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        path = self._folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
                scratch.write(fetch())
            os.replace(scratch.name, path)
        return path.read_bytes()


def main(version: str) -> None:
    """Prints compressed and unpacked megabytes: each compiled library, the rest by suffix."""
    packed: Counter[str] = Counter()
    unpacked: Counter[str] = Counter()
    for member in Wheel(version).archive.infolist():
        path = PurePosixPath(member.filename)
        compiled = path.suffix == ".so" or member.file_size > 20_000_000
        name = str(path) if compiled else f"*{path.suffix}"
        packed[name] += member.compress_size
        unpacked[name] += member.file_size
    for name, size in packed.most_common():
        if size > 10_000:
            print(f"{size / 1e6:8.2f} {unpacked[name] / 1e6:8.2f}  {name}")
    print(f"{packed.total() / 1e6:8.2f} {unpacked.total() / 1e6:8.2f}  all")


if __name__ == "__main__":
    main(sys.argv[1])
