"""A folder of prompts for `vllm-specplus train` from files of this machine: code, documentation and
prose in the shares of the text that the MTP heads in assets/ were trained on.

python -m benchmarks.prompt_mix OUT code:FOLDER docs:FOLDER prose:FOLDER ...

Files are taken in the order of the hash of their path, the first part of each, so no library fills
the mix; a kind's files end in `.KIND`, and the trainer's report is split by that.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

SHARES = {"code": 0.39, "docs": 0.29, "prose": 0.32}
SUFFIXES = {
    "code": (".py", ".js", ".h"),
    "docs": (".md", ".rst", ".txt"),
    "prose": (".html", ".txt"),
}
NUM_CHARS = 1_100_000
"""About 1,100 prompts of text.PIECE_CHARS."""
CHARS_PER_FILE = 6_000
MIN_CHARS = 1_500


class _Main(HTMLParser):
    """The text of a page's <main>."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.parts = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += tag == "main"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "main"

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.parts.append(data)


def read(file: Path) -> str:
    """The text of a file; of a page, what it is about."""
    text = file.read_text(encoding="utf-8", errors="ignore")
    if file.suffix != ".html":
        return text
    page = _Main()
    page.feed(text)
    return "".join(page.parts).strip()


def pick(folders: Sequence[Path], kind: str, num_chars: float) -> Iterator[str]:
    """Texts of so many characters together; ValueError where the folders hold too few."""
    files = {f for folder in folders for f in folder.rglob("*") if f.suffix in SUFFIXES[kind]}
    for file in sorted(files, key=lambda f: hashlib.sha256(str(f).encode()).digest()):
        if num_chars <= 0:
            return
        text = read(file)[:CHARS_PER_FILE] if file.is_file() else ""
        if len(text) >= MIN_CHARS:
            num_chars -= len(text)
            yield text
    if num_chars > 0:
        raise ValueError(f"{kind}: {num_chars:.0f} characters too few; name more folders")


def main(out: str, *sources: str) -> None:
    """Writes the folder."""
    Path(out).mkdir(parents=True)
    for kind, share in SHARES.items():
        folders = [Path(s.partition(":")[2]) for s in sources if s.startswith(f"{kind}:")]
        for number, text in enumerate(pick(folders, kind, share * NUM_CHARS)):
            (Path(out) / f"{number:04}.{kind}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
