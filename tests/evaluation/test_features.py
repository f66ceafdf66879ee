"""Features to compare images by: the classifier learns, is made once and kept; Inception is read from its file."""

import pytest
import torch
import torchvision

from tinytwinflow.data.readers import to_unit
from tinytwinflow.evaluation.features import Classifier, Inception, classifier_of, features_of, train_classifier


class Stripes:
    """Two classes: vertical and horizontal stripes in noise."""

    shape, classes, seed = (1, 8, 8), 2, 0

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        label = torch.randint(2, (32,), generator=generator)
        row = torch.tensor([1.0, -1.0] * 4).expand(8, 8)
        x = torch.where(label[:, None, None] == 0, row, row.T)[:, None]
        return x + torch.randn(x.shape, generator=generator), label


def test_the_classifier_learns_and_is_the_same_every_time():
    first, second = (train_classifier(Stripes(), steps=60) for _ in range(2))
    x, label = Stripes().batch(1000)
    assert (first(x).argmax(1) == label).float().mean() > 0.9
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), first.last(features_of(first, x, batch_size=5)))
    assert features_of(first, x).shape == (32, 128)


def test_the_classifier_is_kept_in_the_run_folder(tmp_path, monkeypatch):
    made = classifier_of(tmp_path, Stripes())
    monkeypatch.setattr("tinytwinflow.evaluation.features.train_classifier", None)
    kept, x = classifier_of(tmp_path, Stripes()), Stripes().batch(5)[0]
    assert torch.equal(made(x), kept(x))
    (tmp_path / "classifier.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="classifier.pt: the file is cut short"):
        classifier_of(tmp_path, Stripes())


def test_inception_is_torchvisions(tmp_path):
    """The features are what the last layer of torchvision's own model is given, behind torchvision's own transform."""
    torch.manual_seed(0)
    model = torchvision.models.Inception3(init_weights=False, transform_input=True).eval()  # as its builder makes it
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    ours, pixels = Inception(tmp_path / "inception.pth").eval(), torch.randint(256, (2, 3, 299, 299), dtype=torch.uint8)
    x, transform = to_unit(pixels), torchvision.models.Inception_V3_Weights.DEFAULT.transforms(resize_size=299)
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        expected, features = model(transform(pixels)), features_of(ours, x)
    assert (features - expected).norm() < 1e-3 * expected.norm()
    assert features.shape == (2, 2048) and features_of(ours, x[:, :, :32, :32]).shape == (2, 2048)
    with pytest.raises(ValueError, match="Inception takes RGB images, these have 1 channels"):
        ours.features(x[:, :1])
    torch.save(Classifier(1, 2).state_dict(), tmp_path / "other.pth")
    for path, fault in (("nowhere.pth", "no such file"), ("other.pth", "not torchvision's Inception")):
        with pytest.raises(ValueError, match=fault) as error:
            Inception(tmp_path / path)
        assert len(str(error.value).splitlines()) == 1
