"""Files of prompts as other programs write them: a line ends at a newline and nowhere else, and the text is UTF-8."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinytwinflow.backbones.captions import Pairs, read_prompts

lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).filter(str.strip)


@settings(max_examples=25)
@given(st.lists(lines, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(0, 3))
def test_a_line_is_a_prompt_whatever_is_in_it(tmp_path_factory, prompts, newline, mark, last):
    """Separators that Python's splitlines knows (U+2028, form feed) are part of a prompt; so of a line of JSON. Blank
    lines at the end are none."""
    folder = tmp_path_factory.mktemp("prompts")
    prompts[0] = "a\u2028b\x0cc" + prompts[0].lstrip("\ufeff")
    content = {
        "a.txt": prompts,
        "a.jsonl": [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts],
    }
    for name, written in content.items():
        whole = "\ufeff" * mark + newline.join(written) + newline * last
        (folder / name).write_bytes(whole.encode("utf-8"))
    assert read_prompts(folder / "a.txt") == [{"prompt": prompt.strip()} for prompt in prompts]
    assert read_prompts(folder / "a.jsonl") == [{"prompt": prompt} for prompt in prompts]


def test_text_of_another_encoding_is_named(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes("café".encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name}: no UTF-8 text$"):
            read_prompts(tmp_path / name)
    (tmp_path / "a.jsonl").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for read in (read_prompts, lambda folder: Pairs(folder, 8)):
        with pytest.raises(ValueError, match="a.txt: no UTF-8 text$"):
            read(tmp_path)


def test_hidden_files_are_no_prompts_and_endings_may_be_in_capitals(tmp_path):
    """Such as other systems leave beside each file: ._a.txt is no text at all."""
    for name in ("b", "a"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.PNG")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.TXT").write_text("a dog")
    for name in ("._a.txt", "._b.PNG", ".c.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\xff")
    assert read_prompts(tmp_path) == [{"prompt": "a cat", "name": "a"}, {"prompt": "a dog", "name": "b"}]
    assert Pairs(tmp_path, 8).prompts == ["a cat", "a dog"]
    assert read_prompts(tmp_path / "b.TXT") == [{"prompt": "a dog"}]
    (tmp_path / "c.JSONL").write_text('{"prompt": "a cat"}')
    assert read_prompts(tmp_path / "c.JSONL") == [{"prompt": "a cat"}]
    (tmp_path / "a.Txt").write_text("another cat")
    with pytest.raises(ValueError, match="one caption, NAME.txt, of each name, a has not$"):
        Pairs(tmp_path, 8)


def test_sizes_are_looked_at_before_anything_is_encoded(tmp_path):
    """So that a size that does not fit, be it the last image's, leaves no folder that is begun with it."""
    for i in range(3):
        Image.new("RGB", (40, 32 + (i < 2))).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a cat")
    assert len(Pairs(tmp_path, 32)) == 3
    with pytest.raises(ValueError, match="2.png: 40 x 32 pixels, smaller than 33 x 33$"):
        Pairs(tmp_path, 33)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1.png: cut short, or not an image"):
        Pairs(tmp_path, 32)
