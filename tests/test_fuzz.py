"""Damaged, foreign and mistaken files and settings: every answer is a right result, or one line that names the file.

A quick version runs with the suite; TINYTWINFLOW_FUZZ=2000 sets the number of examples of each law.
"""

import copy
import io
import json
import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import tinytwinflow as ttf
from tinytwinflow.evaluation.features import Classifier, classifier_of
from tinytwinflow.files import write_json
from tinytwinflow.nets import MLP
from tinytwinflow.runs.build import first_weights
from tinytwinflow.runs.folder import read_log, trained
from tinytwinflow.runs.recipes import RECIPES, configured
from tinytwinflow.runs.run import begin, finish, resume
from tinytwinflow.runs.settings import SETTINGS, check

EXAMPLES = int(os.environ.get("TINYTWINFLOW_FUZZ", 30))
fuzzed = settings(
    max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
SMALL = {"width": 8, "depth": 1, "batch_size": 8, "eval_samples": 16, "steps": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What is damaged: a run of points of a file, in one file and in pieces, a saved model, a classifier."""
    home = tmp_path_factory.mktemp("made")
    np.savetxt(home / "points.csv", np.random.default_rng(0).normal(5, [1, 2], (40, 2)), delimiter=",")
    for name, parallel in (("run", "ddp"), ("pieces", "fsdp")):
        config = configured("toy", data=str(home / "points.csv"), parallel=parallel, **SMALL)
        finish(begin(config, home / name))
    ttf.load(home / "run").save(home / "model.pt")
    (home / "judge").mkdir()
    torch.manual_seed(0)
    torch.save({"net": Classifier(1, 3).state_dict()}, home / "judge" / "classifier.pt")
    return home


@pytest.fixture
def place(made, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def damaged(data, whole):
    """Bytes cut, flipped, overwritten, doubled or lost, anywhere."""
    content, places = bytearray(whole), st.integers(0, len(whole) - 1)
    kind, at = data.draw(st.sampled_from(["cut", "flip", "zero", "double", "lose"])), data.draw(places)
    if kind == "flip":
        for place in [at, *data.draw(st.lists(places, max_size=3))]:
            content[place] ^= data.draw(st.integers(1, 255))
    end = at + data.draw(st.integers(1, 600))
    part = content[at:end]
    content[at:end] = {"cut": b"", "zero": bytes(len(part)), "double": 2 * part, "lose": b""}.get(kind, part)
    return bytes(content[:at] if kind == "cut" else content)


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 3), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3), st.lists(st.floats(), max_size=3), st.just({}), st.just({"a": 1}),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.none()), max_size=2),
)  # fmt: skip


def changed(data, content):
    """A nested dict in which one thing is missing, has another name, or is another thing."""
    whole = content = copy.deepcopy(content)
    key = data.draw(st.sampled_from(list(content)))
    while isinstance(content[key], dict) and content[key] and data.draw(st.integers(0, 3)):
        content = content[key]
        key = data.draw(st.sampled_from(list(content)))
    kind, value = data.draw(st.sampled_from(["missing", "renamed", "odd", "tensor", "tensor"])), content.pop(key)
    if kind == "renamed":
        content[data.draw(st.sampled_from(["model", f"module.{key}", "", 3]))] = value
    elif kind == "tensor" and torch.is_tensor(value):
        others = [value[None], value[:0] if value.ndim else value[None], value.long(), value.bfloat16(), value.double()]
        others += [
            value.to(torch.complex64),
            torch.full_like(value, torch.nan) if value.is_floating_point() else -value,
        ]
        content[key] = others[data.draw(st.integers(0, 6))]
    elif kind != "missing":
        content[key] = data.draw(odd)
    return whole


def answers(readers, *names):
    """What each reader answers, None where it refuses; that it does so in one line which names the file."""
    found = []
    for read in readers:
        try:
            found.append(read())
        except (ValueError, FloatingPointError) as error:
            assert len(str(error).splitlines()) == 1 and any(str(name) in str(error) for name in names), repr(error)
            found.append(None)
    return found


def readers(place):
    """All that read a checkpoint, each telling the samples of what it has read."""

    def weights():
        net = MLP(2, 8, 1, sharp=True)
        first_weights(net, place / "run" / "checkpoint.pt")
        return ttf.sample(net, torch.ones(5, 2), 1).detach()

    def resumed():
        return resume(place / "run").trained().net(torch.ones(5, 2), torch.ones(5), torch.zeros(5)).detach()

    loads = [lambda path=path: torch.as_tensor(ttf.load(path).sample(5, seed=0)) for path in
             (place / "run", place / "run" / "checkpoint.pt", place / "model.pt")]  # fmt: skip
    return [*loads, weights, resumed]


@fuzzed
@given(st.data())
def test_bytes_of_a_checkpoint(made, tmp_path_factory, data):
    """Damage is found, or does not matter: samples are those of the whole file."""
    place = shutil.copytree(made, tmp_path_factory.mktemp("fuzz"), dirs_exist_ok=True)
    expected = [read() for read in readers(made)]
    for name in ("run/checkpoint.pt", "model.pt"):
        (place / name).write_bytes(damaged(data, (made / name).read_bytes()))
    for answer, right in zip(answers(readers(place), place), expected):
        assert answer is None or torch.equal(answer, right)
    shutil.rmtree(place)


@fuzzed
@given(st.data())
def test_content_of_a_checkpoint(made, tmp_path_factory, data):
    """Another thing, or none, under any key: what still can be sampled gives numbers."""
    place = shutil.copytree(made, tmp_path_factory.mktemp("fuzz"), dirs_exist_ok=True)
    for name in ("run/checkpoint.pt", "model.pt"):
        content = torch.load(made / name, weights_only=True)
        torch.save(changed(data, content), place / name)
    for answer in answers(readers(place), place, "cond must hold"):  # where the settings say that it is conditional
        assert answer is None or answer.shape == (5, 2) and answer.isfinite().all()
    shutil.rmtree(place)


@fuzzed
@given(st.data())
def test_a_checkpoint_in_pieces(made, tmp_path_factory, data):
    """Each of its files damaged: found, or the average and the resumed network are those of the whole."""
    place = shutil.copytree(made / "pieces", tmp_path_factory.mktemp("fuzz") / "pieces")
    path = data.draw(st.sampled_from(sorted(p for p in place.glob("checkpoint-*/*"))))
    whole = path.read_bytes()
    path.write_bytes(damaged(data, whole))
    if path.suffix == ".json" and data.draw(st.booleans()):
        write_json(path, changed(data, json.loads(whole)))
    both = [lambda folder=made / "pieces": trained(folder).net.state_dict(),
            lambda folder=made / "pieces": resume(folder).state.net.state_dict()]  # fmt: skip
    damaged_ones = [lambda read=read: read(place) for read in both]
    for answer, right in zip(answers(damaged_ones, place), (read() for read in both)):
        assert answer is None or all(torch.equal(answer[name], right[name]) for name in right)
    shutil.rmtree(place)


class Grey:
    shape, classes, seed = (1, 8, 8), 3, 0


@fuzzed
@given(st.data())
def test_a_classifier(made, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("fuzz")
    whole, x = (made / "judge" / "classifier.pt").read_bytes(), torch.ones(2, 1, 8, 8)
    if data.draw(st.booleans()):
        content = changed(data, torch.load(io.BytesIO(whole), weights_only=True))
        torch.save(content, place / "classifier.pt")
    else:
        (place / "classifier.pt").write_bytes(damaged(data, whole))
    answer = answers([lambda: classifier_of(place, Grey())(x)], place)[0]
    assert answer is None or torch.allclose(answer, classifier_of(made / "judge", Grey())(x), atol=0.05)


@fuzzed
@given(st.data())
def test_settings_and_log_of_a_run(made, tmp_path_factory, data):
    """config.json and log.jsonl: read as they are, or refused; a log loses no line but a last one that is cut."""
    place = shutil.copytree(made, tmp_path_factory.mktemp("fuzz"), dirs_exist_ok=True)
    config, log = place / "run" / "config.json", place / "run" / "log.jsonl"
    if data.draw(st.booleans()):
        write_json(config, changed(data, json.loads(config.read_text())))
    else:
        config.write_bytes(damaged(data, config.read_bytes()))
    log.write_bytes(damaged(data, log.read_bytes()))
    with suppress(ValueError):
        written = json.loads(config.read_bytes())
        sizes = [written.get(name) for name in ("width", "depth", "batch_size")] if isinstance(written, dict) else []
        assume(not any(isinstance(size, int) and size > 500 for size in sizes))  # would take all the memory there is
    for answer in answers(readers(place), ""):
        assert answer is None or answer.shape == (5, 2)
    records = answers([lambda: read_log(place / "run")], log)[0]
    lines = [line for line in log.read_bytes().splitlines() if line]
    assert records is None or len(lines) - 1 <= len(records) <= len(lines)
    shutil.rmtree(place)


@fuzzed
@given(st.data())
def test_settings(data):
    """By name and by text, one or several at once: settings that a file can hold, or one line."""
    recipe = data.draw(st.sampled_from(list(RECIPES)))
    names = data.draw(st.lists(st.sampled_from([*RECIPES[recipe], "steps", "nothing"]), max_size=4, unique=True))
    choices = {name: SETTINGS[name].known for name in names if name in SETTINGS and SETTINGS[name].known}
    values = {name: data.draw(st.one_of(odd, st.sampled_from(choices.get(name, [1])))) for name in names}
    texts = []
    for name in names:
        if data.draw(st.booleans()):
            value = values.pop(name)
            texts.append(data.draw(st.sampled_from([f"{name}={value}", f"{name}={json.dumps(value)}", name, "=", ""])))
    try:
        config = configured(recipe, texts, **values)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, repr(error)
    else:
        assert config.keys() == {"recipe", *RECIPES[recipe]}
        read = json.loads(json.dumps(config))
        check(read)
        assert read == json.loads(json.dumps(read)) and all(config[name] == value for name, value in values.items())
