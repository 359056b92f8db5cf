"""Folders as people have them: every file is accounted for, captions are found or refused, broken files are named."""

import io
import json
import os
import re
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sdlora.data.cache import Cache
from sdlora.data.folder import scan
from sdlora.errors import ConfigError, DatasetError


def picture(path: Path, colour: str | tuple[int, int, int] = "red", size=(20, 10), kind="PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, kind)
    return path


def captions(found) -> dict[str, str]:
    return {e.path.relative_to(found.folder).as_posix(): e.caption for e in found.examples}


def total(line: str) -> tuple[int, int]:
    """Adds up a summary's first clauses, those that count each file once."""
    kinds = "usable|captions?|unreadable|unused caption files?|switched off|other|hidden"
    found = re.match(r"found (\d+) files?: ", line)
    assert found
    counted = re.findall(rf"(?:: |, )(\d+) (?:{kinds})(?= \(|,|$)", line)
    return int(found[1]), sum(int(number) for number in counted)


def test_a_flat_folder(style_dir):
    found = scan(style_dir)
    assert found.summary() == "found 12 files: 6 usable, 6 captions"
    assert [e.path.name for e in found.examples] == [f"picture{k}.png" for k in range(6)]
    first = found.examples[1]
    assert (first.width, first.height, first.repeats, first.group) == (96, 64, 1, "style")
    assert first.caption == "a thing, number 1" and len(first.digest) == 64


def test_every_file_is_accounted_for_in_one_line(tmp_path):
    root = tmp_path / "odd"
    picture(root / "a.png").with_suffix(".txt").write_text("first\n\n  second ")
    picture(root / "copy.png")
    picture(root / "deep" / "er" / "b.jpg", kind="JPEG")
    picture(root / "really a jpeg.png", kind="JPEG")
    picture(root / "no ending", "blue")
    picture(root / "__MACOSX" / "a.png")
    picture(root / ".hidden" / "a.png")
    (root / "._a.png").write_bytes(b"junk")
    (root / "Thumbs.db").write_bytes(b"junk")
    (root / "empty.png").write_bytes(b"")
    (root / "line\nbreak.webp").write_bytes(b"junk")
    picture(root / "c.gif", kind="GIF")
    (root / "notes.md").write_text("BM or not BM")
    (root / "README.txt").write_text("a caption without a picture")
    (root / "a.caption").write_text("overruled")
    two = Image.new("RGB", (8, 8))
    two.save(root / "moving.webp", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    line = scan(root).summary()
    assert line == (
        "found 15 files: 6 usable, 1 caption, 3 unreadable (c.gif, empty.png, line\\nbreak.webp), "
        "2 unused caption files (README.txt, a.caption), 1 other (notes.md), 2 hidden, 1 animated (first frame), "
        "5 without caption, 2 duplicates (copy.png, really a jpeg.png), 2 skipped, hidden folder (.hidden, __MACOSX)"
    )
    assert total(line) == (15, 15)


def test_many_names_are_shortened(tmp_path):
    picture(tmp_path / "a.png")
    for k in range(8):
        (tmp_path / f"x{k}.png").write_bytes(b"")
    line = scan(tmp_path).summary()
    assert "8 unreadable (x0.png, x1.png, x2.png, x3.png, x4.png and 3 more)" in line


def test_kohya_folders(tmp_path):
    picture(tmp_path / "10_my_style" / "a.png")
    picture(tmp_path / "10_my_style" / "deep" / "b.png", "blue").with_suffix(".txt").write_text("own words")
    picture(tmp_path / "2_other" / "c.png", "green")
    picture(tmp_path / "2024_holiday" / "d.png", "white")
    picture(tmp_path / "0_off" / "e.png").with_suffix(".txt").write_text("")
    picture(tmp_path / "plain" / "3_inner" / "f.png", "black")
    found = scan(tmp_path)
    rows = {e.path.name: (e.group, e.repeats, e.caption) for e in found.examples}
    assert rows == {
        "a.png": ("10_my_style", 10, "my style"),
        "b.png": ("10_my_style", 10, "own words"),
        "c.png": ("2_other", 2, "other"),
        "d.png": ("2024_holiday", 1, ""),
        "f.png": ("3_inner", 3, "inner"),
    }
    line = found.summary()
    assert total(line) == (8, 8)
    for clause in (
        "2 switched off (0 repeats) (0_off/e.png, 0_off/e.txt)",
        "3 captioned by the folder's name",
        "10 repeats in 10_my_style",
        "2024_holiday: no repeats, the number is above 1000",
    ):
        assert clause in line
    with_trigger = scan(tmp_path, trigger="sty")
    assert captions(with_trigger)["10_my_style/a.png"] == captions(with_trigger)["plain/3_inner/f.png"] == "sty"
    assert "4 captioned by the trigger word alone" in with_trigger.summary()


def test_captions_are_found_in_the_order_of_preference(tmp_path):
    for k, colour in enumerate(("red", "green", "blue", "white", "black")):
        picture(tmp_path / "in" / f"{k}.png", colour)
    inside = tmp_path / "in"
    (inside / "0.txt").write_text("\ufefftxt", encoding="utf-8")
    for k in range(2):
        (inside / f"{k}.caption").write_text("caption")
    for k in range(3):
        (inside / f"{k}.JSON").write_text('"json"')
    lines = [{"file_name": f"{k}.png", "text": f"near {k}"} for k in range(4)]
    (inside / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    far = [
        {"file_name": "in/3.png", "caption": "far"},
        {"image_path": "in\\..\\in\\4.png", "caption": "far 4", "tags": "x"},
        {"image_path": "gone.png", "caption": "?"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in far) + "\n\n")
    found = scan(tmp_path)
    assert list(captions(found).values()) == ["txt", "caption", "json", "near 3", "far 4, x"]
    line = found.summary()
    assert "1 line of metadata.jsonl without a picture" in line
    assert "3 unused caption files (in/0.JSON, in/0.caption, in/1.JSON)" in line
    assert total(line) == (13, 13)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ({"caption": "a"}, "a"),
        ({"text": "b", "size": [1, 2]}, "b"),
        ({"tags": "c, d"}, "c, d"),
        ({"tags": ["c", " d "]}, "c, d"),
        ({"caption": "a cat\non white", "tags": ["c"]}, "a cat on white, c"),
    ],
)
def test_json_captions(value, expected, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert captions(scan(tmp_path)) == {"a.png": expected}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\xef\xbb\xbf \n\t\n", "a.txt is empty"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 0xe9 at position 3\)"),
        ("a.txt", "a cat".encode("utf-16"), r"a.txt is not UTF-8 \(byte 0xff at position 0\)"),
        ("a.txt", b"x" * (2**20 + 1), "a.txt is larger than 1 MiB"),
        ("a.caption", b"", "a.caption is empty"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.json", b"[1]", "a.json has none of caption, text and tags"),
        ("a.json", b'{"caption": 1}', "a.json should have a text"),
        ("a.json", b'{"tags": []}', "a.json is empty"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ""}', "a.png in metadata.jsonl is empty"),
        ("metadata.jsonl", b'{"file_name": "a.png"}', "a.png in metadata.jsonl has none of caption, text and tags"),
        ("metadata.jsonl", b'\n{"text": "x"}', "metadata.jsonl has no file_name in line 2"),
        ("metadata.jsonl", b"oops", "metadata.jsonl is not JSON in line 1"),
        ("metadata.jsonl", b"\xff", "metadata.jsonl is not UTF-8"),
    ],
)
def test_a_caption_that_cannot_be_read_stops_the_run(name, content, reason, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=rf"1 caption in .* cannot be used:\n  {reason}"):
        scan(tmp_path, trigger="sty")


def test_all_bad_captions_are_told_at_once(tmp_path):
    for k in range(7):
        picture(tmp_path / f"{k}.png").with_suffix(".txt").write_text("")
    with pytest.raises(DatasetError, match=r"7 captions(.|\n)*4\.txt is empty\n  and 2 more\nPut it right"):
        scan(tmp_path)


def test_the_same_name_in_two_unicode_spellings(tmp_path):
    name = "テスト ÖÄ 'q\" émoji🎨"
    picture(tmp_path / "dir ö" / (unicodedata.normalize("NFD", name) + ".png"))
    (tmp_path / "dir ö" / (unicodedata.normalize("NFC", name) + ".txt")).write_text("größer", encoding="utf-8")
    found = scan(tmp_path)
    assert list(captions(found).values()) == ["größer"]
    assert "\n" not in found.summary()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_once_and_loops_end(tmp_path):
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    outside = picture(tmp_path.parent / f"{tmp_path.name}-outside" / "b.png", "blue")
    (tmp_path / "linked.png").symlink_to(outside)
    (tmp_path / "folder").symlink_to(outside.parent)
    found = scan(tmp_path)
    assert list(captions(found)) == ["folder/b.png", "linked.png", "real/a.png"]
    line = found.summary()
    assert "2 skipped, link to a folder that is read anyway (again, real/up)" in line
    assert "1 skipped, broken link or no regular file (self.png)" in line


def test_a_relative_folder_is_read_like_an_absolute_one(tmp_path, monkeypatch):
    picture(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "metadata.jsonl").write_text(
        json.dumps({"image_path": str(tmp_path / "pictures" / "a.png"), "caption": "x"})
    )
    monkeypatch.chdir(tmp_path / "pictures")
    found = scan(Path())
    assert captions(found) == {"a.png": "x"}
    assert found.examples[0].group == "pictures"
    assert captions(scan(Path("../pictures"))) == {"a.png": "x"}


def test_folders_without_a_usable_picture_say_why(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no folder .*missing; give --images"):
        scan(tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"a\.png is a file; give --images the folder"):
        scan(picture(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty is empty; put pictures there"):
        scan(tmp_path / "empty")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"junk")
    (bad / "b.txt").write_text("words")
    (bad / "c.pdf").write_bytes(b"%PDF")
    with pytest.raises(DatasetError, match=r"no usable picture among the 3 files in .*bad:") as caught:
        scan(bad)
    assert str(caught.value).splitlines()[1:] == [
        "  a.png: not a picture; PNG, JPEG, WEBP, BMP, TIFF can be read",
        "  b.txt: a caption without a picture",
        "  c.pdf: not a picture",
    ]
    with pytest.raises(ConfigError, match="background"):
        scan(tmp_path, background="whit")


def test_a_picture_that_was_not_touched_is_not_read_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "pictures", Cache(tmp_path / "cache")
    picture(root / "a.png")
    (root / "a.txt").write_text("a caption")
    soon = time.time() + 10  # files younger than two seconds are read again
    monkeypatch.setattr("sdlora.file_identity.time.time", lambda: soon)
    first = scan(root, cache=cache)
    monkeypatch.setattr("sdlora.data.decoding.read_bytes", lambda path: pytest.fail("read again"))
    (root / "a.txt").write_text("another caption")
    assert [replace(e, caption="a caption") for e in scan(root, cache=cache).examples] == first.examples
    monkeypatch.undo()
    monkeypatch.setattr("sdlora.data.decoding.decode", lambda *_: pytest.fail("decoded again"))
    os.utime(root / "a.png")  # only touched: the same bytes
    assert scan(root, cache=cache).examples[0].digest == first.examples[0].digest


def test_a_changed_picture_is_another_one_even_with_its_old_size_and_time(tmp_path, monkeypatch):
    root, cache = tmp_path / "pictures", Cache(tmp_path / "cache")
    before = picture(root / "a.bmp", "red", kind="BMP").stat()
    soon = time.time() + 10
    monkeypatch.setattr("sdlora.file_identity.time.time", lambda: soon)
    first = scan(root, cache=cache).examples[0]
    time.sleep(0.02)  # a tick of the disk's clock
    picture(root / "a.bmp", "blue", kind="BMP")
    os.utime(root / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (root / "a.bmp").stat().st_size == before.st_size
    assert scan(root, cache=cache).examples[0].digest != first.digest


def test_a_picture_written_a_moment_ago_is_read_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "pictures", Cache(tmp_path / "cache")
    path = picture(root / "a.png")
    scan(root, cache=cache)
    written = []
    monkeypatch.setattr("sdlora.data.decoding.read_bytes", lambda p: written.append(p) or path.read_bytes())
    scan(root, cache=cache)
    assert written == [path]


def test_without_a_cache_nothing_is_remembered(tmp_path):
    picture(tmp_path / "a.png")
    assert scan(tmp_path).examples == scan(tmp_path).examples


def test_a_truncated_picture_is_named_and_the_others_are_used(tmp_path):
    picture(tmp_path / "good.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[:700])
    found = scan(tmp_path)
    assert "1 usable, 1 unreadable (half.jpg)" in found.summary()
    assert "damaged JPEG" in found.unreadable["half.jpg"]
