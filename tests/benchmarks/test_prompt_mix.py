"""The prompts' folder: shares, a part of each file, pages without what is around them.

Sabotages that were caught: whole files, menus of pages, files of another kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prompt_mix import CHARS_PER_FILE, MIN_CHARS, pick, read
from vllm_specplus.train.text import read_prompts


def test_a_page_is_what_it_is_about(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<nav>menu</nav><main>\n<p>a &lt; b</p></main><p>foot</p>")
    assert read(tmp_path / "a.html") == "a < b"


def test_a_part_of_each_file_until_there_is_enough(tmp_path: Path) -> None:
    for number, length in enumerate((100, MIN_CHARS, 4000, 4000, 50_000)):
        (tmp_path / f"{number}.md").write_text(str(number) * length)
    (tmp_path / "x.py").write_text("x" * 4000)
    texts = list(pick([tmp_path], "docs", 13_000))
    assert texts == list(pick([tmp_path], "docs", 13_000))
    lengths = {text[0]: len(text) for text in texts}
    assert lengths.keys() <= set("1234") and len(texts) >= 3
    assert all(length in (MIN_CHARS, 4000, CHARS_PER_FILE) for length in lengths.values())
    with pytest.raises(ValueError, match="docs: 500 characters too few"):
        list(pick([tmp_path], "docs", 16_000))


def test_the_trainer_reads_kinds(tmp_path: Path) -> None:
    for kind in ("code", "prose"):
        (tmp_path / f"0000.{kind}").write_text("x" * 1500)
    assert [prompt.kind for prompt in read_prompts(tmp_path)] == ["code", "code", "prose", "prose"]
