"""Shared strategies, files and processes. Numbers come from Hypothesis, so that a failing case shrinks well."""

import gzip
import multiprocessing
import os
import pickle
import resource
import sys
import time
from contextlib import contextmanager

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import tinytwinflow as ttf

settings.register_profile("exact", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("exact")
torch.set_num_threads(1)

numbers = st.floats(-3, 3, width=32).map(lambda a: round(a, 3))
unit = st.floats(0, 1).map(lambda a: round(a, 4))
inside = st.floats(0.02, 0.98).map(lambda a: round(a, 4))
seeds = st.integers(0, 2**31 - 1)

# What processes that tests start have imported already, being forked from one that has.
WARM = ["torchvision", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "scipy.stats"]
WARM += ["matplotlib.pyplot", "matplotlib_inline.backend_inline", "IPython.core.interactiveshell", "nbformat"]
WARM += ["pytest", "hypothesis.extra.numpy", "diffusers.models.transformers.transformer_sd3"]


def arrays(shape, elements=numbers):
    """Float64 tensors of a shape."""
    return hnp.arrays(np.float64, shape, elements=elements).map(torch.from_numpy)


@st.composite
def batches(draw, count, dims=None):
    """`count` tensors of one shape (B, *D), D of one to three axes, and times (B,)."""
    shape = (draw(st.integers(1, 4)), *(dims or draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))))
    return [draw(arrays(shape)) for _ in range(count)], draw(arrays(shape[0], unit))


@st.composite
def mixtures(draw, dim=None, components=3):
    """Gaussian mixtures with full covariances, of any dimension up to 3."""
    D, K = dim or draw(st.integers(1, 3)), draw(st.integers(1, components))
    means = draw(arrays((K, D), st.floats(-2, 2).map(lambda a: round(a, 2))))
    root = draw(arrays((K, D, D), st.floats(-0.5, 0.5).map(lambda a: round(a, 2))))
    weights = draw(arrays(K, st.floats(0.2, 1).map(lambda a: round(a, 2))))
    return ttf.GaussianMixture(means, root @ root.mT + 0.3 * torch.eye(D, dtype=torch.float64), weights)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def told(said, env, function, args):
    """What a process that `fresh` started does; the words of those that it starts itself go to the file, too."""
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1), os.dup2(words, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.environ.update(env)
    function(*args)


def fresh(said, env, function, *args):
    """Start a function in a fresh process of one thread, whose words go to a file.  -> the process"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    process = context.Process(target=told, args=(said, env, function, args))
    process.start()
    return process


def ended(processes, timeout=150):
    """Wait for processes, and kill those that take too long.  -> their exit statuses, None where one was killed"""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


@contextmanager
def full_at(size):
    """No file of this process can grow beyond so many bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write_mnist(folder, n=40, size=28, zipped=True):
    """Small files in the format of MNIST and Fashion-MNIST: big-endian header, then bytes. Labels 0..9 in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        arrays = {
            "images-idx3": rng.integers(0, 256, (n, size, size), np.uint8),
            "labels-idx1": np.arange(n, dtype=np.uint8) % 10,
        }
        for kind, array in arrays.items():
            raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def write_cifar(folder, n=20):
    """Small files in the format of CIFAR-10: pickled dicts with byte keys, n images in each of six."""
    rng = np.random.default_rng(0)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    for part in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {b"data": rng.integers(0, 256, (n, 3072), np.uint8), b"labels": [i % 10 for i in range(n)]}
        (inside / part).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def write_folder(folder, classes=2, n=6, size=24):
    """A folder of PNG images, a folder a class; wider than high, classes are 0, 80 and 160 bright, in turn."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        (folder / f"class-{k}").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(80 * (k % 3), 80 * (k % 3) + 60, (size, size + 6, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class-{k}" / f"{i}.png")
    return folder


def write_clipart(package, n=4):
    """A package of clip art: n drawings, each a block of a colour of its own, in four folders, of three classes."""
    rng = np.random.default_rng(0)
    for folder in ("animals", "signs_and_symbols", "signs_and_symbols/flags", "transportation/roadsigns"):
        (package / folder).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((40, 60, 3), 255, np.uint8)
            pixels[8:32, 10:40] = rng.integers(0, 200, (6, 10, 3)).repeat(4, 0).repeat(3, 1)
            Image.fromarray(pixels).save(package / folder / f"{i:03}.png")
    return package


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with random weights, saved as diffusers saves one; it halves the image once."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs torch traces; they run as they are."""
    made, own = [], torch.compile

    def keep(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, mode=None: own(forward, backend=keep))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()
