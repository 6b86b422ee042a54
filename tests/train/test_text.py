"""Prompts are read, split and kept; files that were cut off or are damaged are told apart.

Sabotages that were caught: pieces of one file on both sides of the split, an order that depends on
the folder's, a cut line kept, a cut line refused, another model's text taken.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_specplus.errors import OptionError
from vllm_specplus.train.text import (
    PIECE_CHARS,
    Prompt,
    Sample,
    Text,
    TextFile,
    read_prompts,
    split,
)

ROWS = [
    {"question_id": 1, "category": "math", "turns": ["What is 2 + 2?", "Why?"]},
    {"prompt": "Once upon a time"},
    {"text": "def f(x):", "kind": "code"},
]


def _jsonl(file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return file


def test_jsonl(tmp_path: Path) -> None:
    prompts = read_prompts(_jsonl(tmp_path / "p.jsonl"))
    assert [(p.text, p.kind) for p in prompts] == [
        ("What is 2 + 2?", "math"),
        ("Once upon a time", "text"),
        ("def f(x):", "code"),
    ]


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    _jsonl(tmp_path / "b/p.jsonl")
    (tmp_path / "a.py").write_text("x" * PIECE_CHARS + "y = 1")
    (tmp_path / "README").write_text("  \n")
    for name in "zqmwkdc":
        (tmp_path / f"{name}.txt").write_text(name)
    prompts = read_prompts(tmp_path)
    assert [p.kind for p in prompts] == ["py", "py", "math", "text", "code", *["txt"] * 7]
    assert "".join(p.text for p in prompts[5:]) == "cdkmqwz"
    assert prompts[1].text == "y = 1" and prompts[0].source == prompts[1].source


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ('{"prompt": "a"}\n{"prompt": "a"}\n', "must hold two sources at least"),
        ('{"prompt": "a"}\n{"answer": "b"}\n', 'has the line \'{"answer": "b"}\', which is no'),
        ('{"prompt": "a"}\nhello\n', "which is no object"),
        ('{"prompt": "a"}\n[1]\n', "which is no object"),
    ],
)
def test_bad_prompts(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(OptionError, match="prompts=") as refused:
        read_prompts(file)
    assert said in str(refused.value)


def test_split_keeps_sources_together() -> None:
    prompts = [Prompt(f"{s} {part}", "a", f"{s}") for s in range(40) for part in range(3)]
    training, held_out = split(prompts, 0.1)
    assert len(held_out) == 12 and len(training) == 108
    assert not {p.source for p in training} & {p.source for p in held_out}
    backwards = split(prompts[::-1], 0.1)
    assert {p.source for p in backwards[1]} == {p.source for p in held_out}
    for share in (0.0, 1.0):  # both parts have something
        assert all(split(prompts, share))


def _sample(token: int, held_out: bool = False) -> Sample:
    return Sample(token_ids=[token, token + 1], prompt_len=1, kind="a", held_out=held_out)


def test_text_file_grows_and_comes_back(tmp_path: Path) -> None:
    file = TextFile(tmp_path / "t.jsonl", "m")
    file.add([_sample(1), _sample(5, held_out=True)])
    file.add([_sample(9)])
    again = TextFile(tmp_path / "t.jsonl", "m")
    assert again.samples == file.samples == [_sample(1), _sample(5, True), _sample(9)]


def test_interrupted_write_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    TextFile(path, "m").add([_sample(1), _sample(2)])
    path.write_text(path.read_text()[:-10])
    cut = TextFile(path, "m")
    assert cut.samples == [_sample(1)]
    cut.add([_sample(3)])
    assert TextFile(path, "m").samples == [_sample(1), _sample(3)]


def test_damaged_or_foreign_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    TextFile(path, "m").add([_sample(1), _sample(2)])
    with pytest.raises(OptionError, match="remove it or take another folder"):
        TextFile(path, "other")
    path.write_text(path.read_text().replace("[1,2]", "[1,", 1))
    with pytest.raises(OptionError, match="holds a damaged line"):
        TextFile(path, "m")


def test_text() -> None:
    text = Text.of([_sample(1), _sample(5, held_out=True)])
    assert text.tokens.tolist() == [1, 2, 5, 6] and text.offsets.tolist() == [0, 2, 4]
    assert text[1].tolist() == [5, 6] and text.held_out.tolist() == [False, True]
    assert text.digest() != Text.of([_sample(1), _sample(5), _sample(7)]).digest()
    assert text.digest() == Text.of([_sample(1), _sample(5)]).digest()
