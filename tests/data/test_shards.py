"""Shards: each row in one of them; after a stop nothing whole is made again and the folder ends the same."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow.data.shards import BEGUN, place_of, shard_rows, write_index, write_shards


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_the_place_of_a_row_is_where_it_lies(sizes, data):
    """Shards laid one after another: the row of that shard at that place is the row itself."""
    whole = np.arange(sum(sizes))
    parts, ends = np.split(whole, np.cumsum(sizes)[:-1]), np.cumsum(sizes)
    rows = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=9)), int)
    shard, at = place_of(rows, ends)
    assert [parts[s][a] for s, a in zip(shard, at)] == rows.tolist()


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_hold_every_row_once_and_in_order(count, shard):
    shards = shard_rows(count, shard, "part-{:05d}.bin")
    assert list(shards) == sorted(shards) and all(len(rows) == shard for rows in list(shards.values())[:-1])
    assert [int(row) for rows in shards.values() for row in rows] == list(range(count))


def write(out, made, stop=None, **settings):
    def make(rows):
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(rows.tolist())
        return bytes(made[-1])

    shards = shard_rows(5, 2, "part-{:05d}.bin")
    write_shards(out, "things.json", {"size": 3, **settings}, shards, make, lambda file, content: file.write(content))
    write_index(out, "things.json", {"shards": list(shards)})


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stop_costs_no_shard_that_is_whole(stop, tmp_path):
    made = []
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", made, stop)
    assert (tmp_path / "out" / BEGUN).is_file() and not (tmp_path / "out" / "things.json").exists()
    write(tmp_path / "out", made)
    assert made == [[0, 1], [2, 3], [4]] and not (tmp_path / "out" / BEGUN).exists()
    write(tmp_path / "whole", [])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    with pytest.raises(ValueError, match="out already holds things: choose another --out$"):
        write(tmp_path / "out", [])


def test_a_folder_begun_otherwise_is_refused_in_one_line(tmp_path):
    """With other settings, by an earlier version, which kept a list, or by something else. A folder in which nothing
    was made yet may be begun anew."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", [], 1)
    with pytest.raises(ValueError, match="was begun with size 3, not 4: choose another --out$"):
        write(tmp_path / "out", [], size=4)
    (tmp_path / "out" / BEGUN).write_text(json.dumps(["pictures", 12, 16]))
    with pytest.raises(ValueError, match="no record of how .*out was begun") as error:
        write(tmp_path / "out", [])
    assert "\n" not in str(error.value)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "empty", [], 0)
    write(tmp_path / "empty", [], size=4)
