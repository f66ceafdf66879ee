"""Image sets: true formats read exactly, batches a function of the step, damage named in one line."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from conftest import write_cifar, write_folder, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinytwinflow.data.images import Images
from tinytwinflow.data.readers import to_unit


def to_bytes(x):
    """Floats in [-1, 1] back to the bytes they came from."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all kinds of image sets."""
    home = tmp_path_factory.mktemp("data")
    write_mnist(home)
    write_mnist(home / "raw" / "MNIST" / "raw", n=20, zipped=False)
    write_cifar(home)
    write_folder(home / "pictures", n=30)
    return home


@given(st.integers(0, 255))
def test_bytes_and_floats_are_inverse(value):
    pixel = torch.tensor([value], dtype=torch.uint8)
    assert to_bytes(to_unit(pixel)) == pixel and -1 <= to_unit(pixel) <= 1


def test_mnist_files_are_read_exactly(home):
    """Debian's compressed files and torchvision's plain ones alike."""
    raw = gzip.decompress((home / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    data = Images("fashion", 40, folder=home, size=28)
    assert data.shape == (1, 28, 28) and data.classes == 10
    x, label = data.batch(0)
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(40, 1, 28, 28)
    order = torch.stack([(to_bytes(x) == image).flatten(1).all(1) for image in pixels]).float().argmax(0)
    assert torch.equal(to_bytes(x), pixels[order]) and torch.equal(label, order % 10)
    assert sorted(order.tolist()) == list(range(40)), "an epoch shows every image once"
    assert Images("mnist", 5, folder=home / "raw", size=28).batch(0)[0].shape == (5, 1, 28, 28)


def test_cifar_batches_are_read_exactly(home):
    data = Images("cifar10", 100, folder=home, size=32)
    x, label = data.batch(0)
    assert data.shape == (3, 32, 32) and x.shape == (100, 3, 32, 32)
    first = pickle.loads((home / "cifar-10-batches-py" / "data_batch_1").read_bytes(), encoding="bytes")
    image = torch.from_numpy(first[b"data"][7].reshape(3, 32, 32))
    found = (to_bytes(x) == image).flatten(1).all(1)
    assert found.sum() == 1 and label[found] == 7


def test_a_folder_of_pictures_is_read_as_middle_squares(home):
    data = Images(str(home / "pictures"), 57, size=24)
    x, label = data.batch(0)
    assert data.shape == (3, 24, 24) and data.classes == 2 and sorted(label.tolist()) == [0] * 29 + [1] * 28
    whole = np.asarray(Image.open(home / "pictures" / "class-1" / "3.png"))
    middle = torch.from_numpy(whole[:, 3:-3].copy()).permute(2, 0, 1)
    assert sum(torch.equal(to_bytes(image), middle) for image in x) == 1
    assert Images(str(home / "pictures"), 4, size=16).batch(0)[0].shape == (4, 3, 16, 16)


SOURCES = {"fashion": 28, "cifar10": 32, "pictures": 16}


@settings(max_examples=15)
@given(st.sampled_from(sorted(SOURCES)), st.integers(1, 30), st.integers(0, 20), st.integers(0, 5), st.booleans())
def test_a_batch_depends_on_the_step_alone(home, name, batch_size, step, seed, flip):
    """So a run resumed in the middle of an epoch sees what it would have seen."""
    data = str(home / name) if name == "pictures" else name
    first, second = (Images(data, batch_size, seed, home, SOURCES[name], flip) for _ in range(2))
    for i in range(min(step, 3)):
        first.batch(i)
    (x, label), (x_again, label_again) = first.batch(step), second.batch(step)
    assert torch.equal(x, x_again) and torch.equal(label, label_again)
    assert not torch.equal(x, Images(data, batch_size, seed + 1, home, SOURCES[name], flip).batch(step)[0]) or flip


@settings(max_examples=15)
@given(st.integers(1, 60), st.integers(0, 3))
def test_every_epoch_shows_every_image_once_whatever_the_batch(home, batch_size, seed):
    data = Images("fashion", batch_size, seed, home, 28)
    seen = torch.cat([data.batch(step)[0] for step in range(-(-80 // batch_size))])[:80]
    for epoch in seen.flatten(1).split(40):
        assert len(epoch.unique(dim=0)) == 40
    assert not torch.equal(seen[:40], seen[40:]), "each in its own order"


def test_half_of_the_images_are_mirrored(home):
    sources = [Images("cifar10", 100, 0, home, 32, flip) for flip in (False, True)]
    plain, flipped = (torch.cat([source.batch(i)[0] for i in range(4)]) for source in sources)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert ((flipped == plain).flatten(1).all(1) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_a_subset_takes_so_many_of_each_class(home):
    data = Images("fashion", 20, folder=home, size=28, subset=2)
    assert sorted(data.batch(0)[1].tolist()) == sorted(list(range(10)) * 2)


def test_real_images_to_measure_against_come_from_the_test_part(home):
    data = Images("fashion", 40, folder=home, size=28)
    (first, label), (second, _) = data.fresh(15, 0), data.fresh(30, 1)
    assert len(first) == len(label) == 15 and len(second) == 20, "half of the 40 at most"
    raw = gzip.decompress((home / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    tests = {raw[784 * i : 784 * (i + 1)]: i % 10 for i in range(40)}
    both = [image.numpy().tobytes() for image in to_bytes(torch.cat([first, second]))]
    assert len(set(both)) == 35 and set(both) <= tests.keys()
    assert [tests[image] for image in both[:15]] == label.tolist()


def test_of_a_folder_every_twentieth_image_is_kept_from_training(home):
    data = Images(str(home / "pictures"), 57, size=16)
    trained, kept = data.batch(0)[0], torch.cat([data.fresh(9, draw)[0] for draw in (0, 1)])
    assert len(data.train) == 60 and len(trained) == 57 and len(kept) == 2
    assert len(torch.cat([trained, kept]).flatten(1).unique(dim=0)) == 59, "an odd one out is in neither half"


class Evil:
    """A pickle that makes a file when it is read by an unguarded reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_missing_and_damaged_sets_are_named(home, tmp_path):
    def refused(match, *arguments, **options):
        with pytest.raises(ValueError, match=match) as error:
            Images(*arguments, **options).batch(0)
        assert len(str(error.value).splitlines()) == 1

    refused(
        r"mnist: none of .*train-images-idx3-ubyte.* or their .gz is there; get it by",
        "mnist",
        4,
        folder=tmp_path,
        size=28,
    )
    refused(r"cifar10: none of .*data_batch_1.*CIFAR10\(.*download=True", "cifar10", 4, folder=tmp_path, size=32)
    refused("no such folder; data is one of fashion, mnist, cifar10, clipart, a folder", str(tmp_path / "x"), 4)
    refused("size must be at most 28 for fashion, got 32", "fashion", 4, folder=home, size=32)
    write_mnist(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:100])
    refused("train-images-idx3-ubyte.gz: cut short or not gzip", "mnist", 4, folder=tmp_path, size=28)
    images.write_bytes(gzip.compress(b"a" * 1000)[:12] + b"junk" * 30)
    refused("train-images-idx3-ubyte.gz: cut short or not gzip", "mnist", 4, folder=tmp_path, size=28)
    images.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0" * 11))
    refused("not a whole idx file", "mnist", 4, folder=tmp_path, size=28)
    images.unlink()
    refused("train-images-idx3-ubyte is missing, next to others", "mnist", 4, folder=tmp_path, size=28)
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"\x80")
    refused("data_batch_3: cut short, or no CIFAR-10 batch", "cifar10", 4, folder=tmp_path, size=32)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Evil(str(tmp_path / "evil"))))
    refused("data_batch_3: cut short, or no CIFAR-10 batch", "cifar10", 4, folder=tmp_path, size=32)
    assert not (tmp_path / "evil").exists(), "a pickle must not run what it names"
    labels = [0, 10] * 10
    content = {b"data": np.zeros((20, 3072), np.uint8), b"labels": labels}
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(content))
    refused(r"labels must lie in \[0, 9\], got up to 10", "cifar10", 4, folder=tmp_path, size=32)

    pictures = write_folder(tmp_path / "pictures")
    refused("30 x 24 pixels, smaller than 32 x 32", str(pictures), 12, size=32)
    whole = (pictures / "class-0" / "0.png").read_bytes()
    wrong_length = whole[:8] + b"\0\0\0\1" + whole[12:]  # of the first chunk: the reader has its own words for it
    for content in (b"not a picture", whole[:200], wrong_length):
        (pictures / "class-0" / "0.png").write_bytes(content)
        refused("class-0/0.png: cut short, or not an image", str(pictures), 12, size=16)
    (pictures / "class-1" / "notes.txt").write_text("hello")
    refused("notes.txt: not an image in a folder of a class", str(pictures), 12, size=16)
    (tmp_path / "empty").mkdir()
    refused(
        "empty: holds no images; it needs images, or a folder for each class",
        str(tmp_path / "empty"),
        4,
        size=16,
    )
