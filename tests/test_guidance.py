"""OT guidance on a small real problem: it has the documented effects, and no others."""

from __future__ import annotations

import json

import pytest
import torch

from ot_diffusers import guidance
from ot_diffusers.errors import InputError
from ot_diffusers.guidance import PIXELS_PER_STEP, OTGuidance
from ot_diffusers.models.feature_extractor import ConvFeatureExtractor, FeatureExtractorOutput
from ot_diffusers.models.guidance_field import Correction, GuidanceField, completed
from ot_diffusers.models.reference_bank import ReferenceBank
from ot_diffusers.transport import divergence_gradient, median_distance, mmd_displacement, sinkhorn_divergence


def _images(count: int, seed: int) -> torch.Tensor:
    """Bright squares at random positions, [count, 1, 8, 8] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 1, 8, 8), -1.0)
    for image, (row, column) in zip(images, torch.randint(5, (count, 2), generator=generator).tolist(), strict=True):
        image[:, row : row + 3, column : column + 3] = 1.0
    return images


@pytest.fixture
def parts() -> tuple[ConvFeatureExtractor, ReferenceBank]:
    torch.manual_seed(0)
    network = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=32)
    features = network.extract(_images(200, seed=1))
    return network, ReferenceBank.from_features(features, feature_scale=median_distance(features))


def _blurred(count: int = 32) -> torch.Tensor:
    """Images mixed with their mean, like the early predictions of a network."""
    images = _images(count, seed=2)
    return 0.5 * images + 0.5 * images.mean(0)


def _divergence(parts, images: torch.Tensor) -> float:
    network, bank = parts
    return sinkhorn_divergence(network.extract(images) / bank.config.feature_scale, bank.references(), blur=0.3).item()


@pytest.mark.parametrize(
    ("count", "num_references", "is_weighted", "blur"),
    [(99, 500, False, 0.6), (100, 499, False, 0.6), (100, 500, False, 0.3), (99, 90, True, 0.3)],
)
def test_few_images_are_guided_at_a_larger_blur(parts, count, num_references, is_weighted, blur):
    network, images = parts[0], _blurred(count)
    features = network.extract(_images(num_references, seed=1))
    weights = torch.arange(1.0, num_references + 1) if is_weighted else None
    parts = network, ReferenceBank.from_features(features, feature_scale=median_distance(features), weights=weights)
    corrected = OTGuidance(*parts).correct(images)
    assert torch.equal(corrected, OTGuidance(*parts, blur=blur).correct(images))
    assert not torch.equal(corrected, OTGuidance(*parts, blur=0.9 - blur).correct(images))


@pytest.mark.parametrize("normalize_features", [True, False])
def test_guidance_brings_the_batch_nearer_to_the_references(parts, normalize_features):
    images = _blurred()
    blur = 0.3 if normalize_features else 0.3 * parts[1].config.feature_scale
    guidance = OTGuidance(*parts, num_correction_steps=15, blur=blur, normalize_features=normalize_features)
    assert _divergence(parts, guidance.correct(images)) < 0.5 * _divergence(parts, images)


def test_the_steps_that_a_gpu_takes_suffice(parts_with_images):
    """Fixed numbers of iterations instead of convergence, first from a cold start and then from the last potentials."""
    history: list[Correction] = []
    guidance = OTGuidance(*parts_with_images, history=history)
    images = _blurred()
    for timestep in range(4):
        images = guidance.correct(images, timestep)
    references, potentials = guidance.features(_images(200, seed=1)).detach(), None
    for correction in history:
        count = guidance._num_iterations(guidance.blur, torch.device("cuda"), potentials is not None)
        expected, _ = divergence_gradient(correction.features, references, blur=guidance.blur)
        actual, potentials = divergence_gradient(
            correction.features, references, blur=guidance.blur, initial=potentials, num_iterations=count
        )
        assert 0 < (actual - expected).norm() < 0.02 * expected.norm()
    assert guidance._num_iterations(guidance.blur, torch.device("cpu"), True) is None
    assert guidance._num_iterations(0.1, torch.device("cuda"), True) is None  # no tested number suffices


def test_steps_are_bounded_where_features_change_fast():
    """With an untrained network and a tenth of its `feature_scale`, a full step would go far beyond the references."""
    torch.manual_seed(0)
    network, images = ConvFeatureExtractor(sample_size=8, block_out_channels=(8, 16), feature_dim=32), _images(200, 1)
    features = network.extract(images)
    bank = ReferenceBank.from_features(features, feature_scale=0.1 * median_distance(features), images=images)
    start, parts = _blurred(), (network, bank)
    assert _divergence(parts, OTGuidance(*parts, num_correction_steps=1).correct(start)) < _divergence(parts, start)


def test_images_that_are_already_right_stay_closer_than_those_that_are_not(parts):
    real = _images(200, seed=1)[:64]
    guidance = OTGuidance(*parts, num_correction_steps=15)
    assert _divergence(parts, guidance.correct(real)) <= _divergence(parts, real)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_no_pixel_moves_further_than_the_scale_allows(parts, scale, steps):
    images = _blurred()
    moved = OTGuidance(*parts, guidance_scale=scale, num_correction_steps=steps).correct(images) - images
    # Adam's steps have the size of its learning rate for constant gradients, and over few steps at most 1.2 times that
    # for other gradients.
    bound = scale * PIXELS_PER_STEP * steps
    assert 0 < moved.abs().max() <= 1.2 * bound
    if steps == 1:
        assert moved.abs().max() == pytest.approx(bound, rel=1e-3)


def test_the_result_is_an_image(parts):
    corrected = OTGuidance(*parts, guidance_scale=50.0).correct(_blurred() * 1.5)
    assert corrected.min() == -1 and corrected.max() == 1


def test_scale_zero_returns_the_images_themselves(parts):
    images = _blurred() * 2
    assert OTGuidance(*parts, guidance_scale=0).correct(images) is images


def test_the_parts_are_left_as_they_were(parts):
    network, bank = parts
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    before = {name: value.clone() for model in parts for name, value in model.state_dict().items()}
    images = _blurred()
    kept = images.clone()
    corrected = OTGuidance(*parts).correct(images)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for model in parts for name, value in model.state_dict().items())
    assert torch.equal(images, kept) and not images.requires_grad and images.grad is None
    assert not corrected.requires_grad and corrected.grad_fn is None
    assert not bank.features.requires_grad


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter_and_stays(parts, mode):
    images = _blurred()
    expected = OTGuidance(*parts).correct(images)
    with mode():
        enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        actual = OTGuidance(*parts).correct(_blurred())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (enabled, inference)
    assert torch.equal(actual, expected)


def test_autocast_does_not_reach_inside(parts):
    images = _blurred()
    expected = OTGuidance(*parts).correct(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OTGuidance(*parts).correct(images), expected)


def test_parts_of_a_batch_on_a_cpu_change_nothing(parts, monkeypatch):
    images = _blurred(33)
    whole = OTGuidance(*parts).correct(images)
    monkeypatch.setattr(guidance, "CPU_VALUES", 8 * 64)
    torch.testing.assert_close(OTGuidance(*parts).correct(images), whole, rtol=0, atol=1e-5)


def test_half_precision_keeps_its_dtype(parts):
    images = _blurred().bfloat16()
    actual = OTGuidance(*parts).correct(images)
    assert actual.dtype == torch.bfloat16
    # The same correction, up to rounding: bfloat16 has steps of 2^-8 near 1.
    assert (actual.float() - OTGuidance(*parts).correct(images.float())).abs().max() <= 2**-8
    parts[0].bfloat16()
    assert OTGuidance(*parts).correct(images).dtype == torch.bfloat16


def test_the_same_batch_gives_the_same_images(parts):
    assert torch.equal(OTGuidance(*parts).correct(_blurred()), OTGuidance(*parts).correct(_blurred()))


class _Fixed(OTGuidance):
    """Uses the fixed numbers of iterations of a GPU, with which potentials of another chain would change the result."""

    def _num_iterations(self, blur: float, device: torch.device, is_warm: bool) -> int | None:
        return super()._num_iterations(blur, torch.device("cuda"), is_warm)


@pytest.mark.parametrize("kind", [OTGuidance, _Fixed])
@pytest.mark.parametrize("timestep", [None, 500])
def test_what_an_object_did_before_does_not_matter(parts, kind, timestep):
    fresh, used = kind(*parts), kind(*parts)
    used.correct(_images(32, seed=9), timestep)
    used.correct(_images(7, seed=9), timestep)
    with used.chain():
        used.correct(_images(32, seed=9), 900)
    expected = fresh.correct(_blurred(), timestep)
    assert torch.equal(used.correct(_blurred(), timestep), expected)
    assert torch.equal(used.correct(_blurred(), timestep), expected)


def _chain(guidance: OTGuidance, images: torch.Tensor) -> torch.Tensor:
    with guidance.chain():
        for timestep in (800, 600, 400):
            images = guidance.correct(images, timestep)
    return images


@pytest.mark.parametrize("kind", [OTGuidance, _Fixed])
def test_equal_chains_give_equal_images(parts, kind):
    guidance = kind(*parts)
    expected = _chain(guidance, _blurred())
    assert torch.equal(_chain(guidance, _blurred()), expected)
    with pytest.raises(InputError), guidance.chain():
        guidance.correct(_blurred(), 700)
        guidance.correct(_blurred() * torch.nan, 600)
    assert torch.equal(_chain(guidance, _blurred()), expected)


def test_a_chain_starts_its_solver_where_it_was(parts):
    """Warm starts change the images only within the tolerance of the solver; they are for speed."""
    cold, seen = OTGuidance(*parts), []

    class Watched(OTGuidance):
        def _warm_start(self, batch_size, device):
            seen.append(super()._warm_start(batch_size, device) is not None)
            return super()._warm_start(batch_size, device)

    images = _blurred()
    for timestep in (800, 600, 400):
        images = cold.correct(images, timestep)
    # In a few pixels, the tolerance of 1e-4 changes the signs of tiny gradients, and with them Adam's first step.
    assert ((_chain(Watched(*parts), _blurred()) - images).abs() > 1e-3).float().mean() < 0.02
    assert seen == [False] + [True] * 8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"be floating point, in \[-1, 1\], got torch.uint8"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.bool), "be floating point"),
        (torch.rand(4, 1, 8, 8) * 255, r"lie in \[-1, 1\], got 'values from"),
        (torch.full((4, 1, 8, 8), 255.0).half(), r"lie in \[-1, 1\], got 'values from 255 to 255'"),
        (torch.full((4, 1, 8, 8), torch.nan), "be finite, got 'NaN or Inf'"),
        (torch.full((4, 1, 8, 8), -torch.inf), "be finite, got 'NaN or Inf'"),
    ],
)
def test_images_of_another_range_are_refused(parts, images, message):
    with pytest.raises(InputError, match="`pred_original_sample` must " + message):
        OTGuidance(*parts).correct(images)


def test_what_noise_leaves_of_an_image_is_taken(parts):
    """At the first step, with α = .0064, the values of an unclipped x̂0 are hundreds of times those of an image."""
    noise = 300 * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert OTGuidance(*parts).correct(noise).abs().max() == 1
    assert OTGuidance(*parts).correct(torch.rand(32, 1, 8, 8)).min() < 1  # [0, 1] is within [-1, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_part_is_named(parts, value):
    network, bank = parts
    bank.features.data[3, 4] = value
    with pytest.raises(InputError, match="`reference_bank` must hold finite features, got 'NaN or Inf'"):
        OTGuidance(network, bank)
    bank.features.data[3, 4] = 0
    network.backbone[0].weight.data[:] = value
    with pytest.raises(InputError, match="`feature_extractor` must give finite features, got 'NaN or Inf'"):
        OTGuidance(network, bank).correct(_blurred())


def test_a_batch_of_one_is_pulled_towards_the_mean(parts):
    image = _blurred()[:1]
    network, bank = parts
    mean = bank.features.mean(0)
    corrected = OTGuidance(*parts, num_correction_steps=10).correct(image)
    assert (network.extract(corrected) - mean).norm() < (network.extract(image) - mean).norm()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": -1}, "`guidance_scale` must be at least 0, got -1"),
        ({"num_correction_steps": 0}, "`num_correction_steps` must be at least 1, got 0"),
        ({"blur": 0.0}, "`blur` must be a positive length, got 0.0"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number, got inf"),
        ({"guidance_scale": "1"}, "`guidance_scale` must be a finite number, got '1'"),
        ({"num_correction_steps": 2.5}, "`num_correction_steps` must be an integer, got 2.5"),
        ({"blur": float("nan")}, "`blur` must be a finite number, got nan"),
        ({"pixel_weight": float("inf")}, "`pixel_weight` must be a finite number, got inf"),
    ],
)
def test_bad_options_are_named(parts, options, message):
    with pytest.raises(InputError, match=message):
        OTGuidance(*parts, **options)


def test_a_bank_of_another_network_is_refused(parts):
    with pytest.raises(InputError, match="`reference_bank` must hold features of width 32, got 16"):
        OTGuidance(parts[0], ReferenceBank.from_features(torch.randn(10, 16)))
    network = ConvFeatureExtractor(sample_size=8, feature_dim=32, dataset="digits", data_fingerprint="a")
    bank = ReferenceBank.from_features(torch.randn(10, 32), dataset="mnist", data_fingerprint="b")
    with pytest.raises(InputError, match=r"come from the data of the feature network \(digits\), got 'mnist'"):
        OTGuidance(network, bank)


def test_images_of_another_size_are_refused(parts):
    with pytest.raises(InputError, match=r"`images` must have shape \[B, 1, 8, 8\], got \(2, 3, 8, 8\)"):
        OTGuidance(*parts).correct(torch.zeros(2, 3, 8, 8))


# --- pixels beside the features -------------------------------------------------------------------------------------


@pytest.fixture
def parts_with_images(parts) -> tuple[ConvFeatureExtractor, ReferenceBank]:
    network, _ = parts
    images = _images(200, seed=1)
    features = network.extract(images)
    return network, ReferenceBank.from_features(features, images=images, feature_scale=median_distance(features))


def test_features_and_pixels_count_alike(parts_with_images):
    guidance = OTGuidance(*parts_with_images)
    points = guidance.features(_images(200, seed=1))
    assert points.shape == (200, 32 + 64)
    torch.testing.assert_close(points, guidance._references)
    assert median_distance(points) == pytest.approx(1, abs=0.1)
    for part in (points[:, :32], points[:, 32:]):
        assert median_distance(part) == pytest.approx(0.5**0.5, abs=0.01)


def test_pixels_keep_speckle_away(parts_with_images):
    """The features are almost blind to noise, and guidance by features alone adds noise."""
    clean = _images(64, seed=5)
    noise = 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    images = (clean + noise).clamp(-1, 1)

    def left(weight: float) -> float:
        options = {"num_correction_steps": 10, "blur": 0.3, "step_rule": "adam"}
        guidance = OTGuidance(*parts_with_images, pixel_weight=weight, **options)
        return float((guidance.correct(images) - clean).square().mean())

    before = float((images - clean).square().mean())
    assert left(1.0) < 0.95 * before < before < left(0.0)


def test_pixels_are_seen_where_there_are_any(parts, parts_with_images):
    assert OTGuidance(*parts).pixel_weight == 0
    assert OTGuidance(*parts_with_images).pixel_weight == 1
    assert OTGuidance(*parts_with_images, normalize_features=False).pixel_weight == 0
    plain = OTGuidance(*parts).correct(_blurred())
    torch.testing.assert_close(OTGuidance(*parts_with_images, pixel_weight=0).correct(_blurred()), plain)
    with pytest.raises(InputError, match=r"`pixel_weight` must be 0 for a reference set without thumbnails, got 1\.0"):
        OTGuidance(*parts, pixel_weight=1.0)
    with pytest.raises(InputError, match=r"`pixel_weight` must be at least 0, got -1"):
        OTGuidance(*parts_with_images, pixel_weight=-1)


def test_displacements_leave_alone_what_is_right(parts_with_images):
    images = _images(200, seed=1)
    moved = {
        rule: (OTGuidance(*parts_with_images, step_rule=rule).correct(images) - images).abs().mean()
        for rule in ("displacement", "adam")
    }
    assert moved["displacement"] < 0.2 * moved["adam"]


def test_the_kernel_discrepancy_is_followed_instead(parts_with_images):
    """Both move a batch towards the references, by displacements of their own; a field is a plan's alone."""
    sinkhorn, mmd = (OTGuidance(*parts_with_images, metric=metric) for metric in ("sinkhorn", "mmd"))
    images = _blurred(32)
    references = mmd._references

    def discrepancy(batch):
        return mmd_displacement(mmd.features(batch), references).square().sum(1).mean()

    assert discrepancy(mmd.correct(images)) < 0.9 * discrepancy(images)
    assert (mmd.correct(images) - sinkhorn.correct(images)).abs().max() > 1e-3
    with pytest.raises(InputError, match="`metric` must be one of sinkhorn, mmd, got 'energy'"):
        OTGuidance(*parts_with_images, metric="energy")
    with pytest.raises(InputError, match="`metric` must be sinkhorn where a guidance field is recorded or followed"):
        OTGuidance(*parts_with_images, metric="mmd", history=[])


def test_step_rules(parts, parts_with_images):
    assert OTGuidance(*parts).step_rule == "adam" == OTGuidance(*parts_with_images, pixel_weight=0).step_rule
    assert OTGuidance(*parts_with_images).step_rule == "displacement"
    with pytest.raises(InputError, match="`step_rule` must be adam for a reference set without thumbnails"):
        OTGuidance(*parts, step_rule="displacement")
    with pytest.raises(InputError, match="`step_rule` must be one of displacement, adam, got 'sgd'"):
        OTGuidance(*parts, step_rule="sgd")


def test_a_field_of_features_and_pixels(parts_with_images):
    history: list[Correction] = []
    OTGuidance(*parts_with_images, num_correction_steps=2, history=history).correct(_blurred(256), 500)
    options = {"pixel_weight": 1.0, "step_rule": "displacement"}
    field = GuidanceField.from_corrections(history, guidance_scale=1.0, blur=0.3, **options)
    guidance = OTGuidance(*parts_with_images, num_correction_steps=2, guidance_field=field)
    images = _blurred(24)
    torch.testing.assert_close(guidance.correct(images[:1], 500), guidance.correct(images, 500)[:1], rtol=0, atol=1e-5)
    with pytest.raises(
        InputError, match=r"`pixel_weight` must be 1\.0, as in the recording of the guidance field, got 0"
    ):
        OTGuidance(*parts_with_images, num_correction_steps=2, guidance_field=field, pixel_weight=0)


# --- a recorded field -----------------------------------------------------------------------------------------------


@pytest.fixture
def field(parts) -> GuidanceField:
    history: list[Correction] = []
    guidance = OTGuidance(*parts, num_correction_steps=2, history=history)
    guidance.correct(_blurred(1000), 500)
    return guidance.recorded_field()


def test_a_member_of_the_bank_moves_as_it_did_in_the_batch(parts, field):
    bank = _blurred(1000)
    together = OTGuidance(*parts, num_correction_steps=2).correct(bank)
    alone = OTGuidance(*parts, num_correction_steps=2, guidance_field=field).correct(bank[:8], 500)
    # Each image is guided as a 1,001st sample, next to a copy of itself.
    moved, expected = (alone - bank[:8]).flatten(1), (together[:8] - bank[:8]).flatten(1)
    assert torch.cosine_similarity(moved, expected).min() > 0.9


def test_with_a_field_images_do_not_depend_on_their_companions(parts, field):
    guidance = OTGuidance(*parts, num_correction_steps=2, guidance_field=field)
    images = _blurred(24)
    together = guidance.correct(images, 500)
    for rows in (slice(0, 1), slice(5, 12)):
        torch.testing.assert_close(guidance.correct(images[rows], 500), together[rows], rtol=0, atol=1e-5)


def test_a_field_brings_new_images_nearer_to_the_references(parts, field):
    images = _images(64, seed=5)
    images = 0.5 * images + 0.5 * images.mean(0)
    guidance = OTGuidance(*parts, num_correction_steps=2, guidance_field=field)
    assert _divergence(parts, guidance.correct(images, 500)) < 0.95 * _divergence(parts, images)


@pytest.mark.parametrize("count", [16, 64, 256])
def test_a_field_of_few_samples_leaves_alone_what_is_right(count):
    """For equal distributions the field of infinitely many samples is 0; anything else in the field of a few is
    noise."""
    generator = torch.Generator().manual_seed(0)
    samples, references, others = (torch.randn(rows, 8, generator=generator) / 4 for rows in (count, 400, 100))
    lengths = []
    for cloud, weights in ((samples, None), completed(samples, references)):
        _, potentials = divergence_gradient(cloud, references, blur=0.3, x_weights=weights)
        field = GuidanceField.from_corrections([Correction(0, samples, potentials)], guidance_scale=1.0, blur=0.3)
        assert field.config.is_completed == (weights is not None)
        lengths.append(field.gradient(others, references, timestep=0, correction=0).norm(dim=1).mean())
    assert lengths[1] < lengths[0] / (5 if count < 100 else 2)


def test_a_field_of_enough_samples_is_theirs_alone():
    cloud, weights = completed(torch.randn(1000, 2), torch.randn(5, 2))
    assert cloud.shape == (1000, 2) and weights is None
    cloud, weights = completed(torch.randn(750, 2), torch.randn(5, 2))  # the references have a mass of 2 × 250 of 1,250
    assert cloud.shape == (755, 2) and weights[:750].sum().item() == pytest.approx(0.6)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_field_recorded_before_fields_were_completed_loads(tmp_path):
    field = GuidanceField((500,), 2, 30, 40, 6)
    field.features.data.normal_()
    field.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["is_completed"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, arguments = GuidanceField.from_pretrained(tmp_path), (torch.randn(3, 6), torch.randn(40, 6))
    actual, expected = (part.gradient(*arguments, timestep=500, correction=1) for part in (again, field))
    assert torch.equal(actual, expected)


def test_a_field_leaves_steps_alone_that_it_was_not_recorded_at(parts, field):
    images = _blurred(4)
    assert OTGuidance(*parts, num_correction_steps=2, guidance_field=field).correct(images, 480) is images


def test_a_field_comes_back_from_disk(field, tmp_path):
    field.half().save_pretrained(tmp_path)
    again = GuidanceField.from_pretrained(tmp_path)
    assert tuple(again.config.timesteps) == (500,)
    torch.testing.assert_close(again.features.float(), field.features.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "`guidance_scale` must be 1.0, as in the recording of the guidance field, got 0.5"),
        ({"blur": 0.1}, "`blur` must be 0.6, as in the recording of the guidance field, got 0.1"),
    ],
)
def test_a_field_refuses_another_guidance(parts, field, options, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        OTGuidance(*parts, guidance_field=field, **{"num_correction_steps": 2} | options)


def test_a_field_wants_the_timestep_and_the_references_it_was_recorded_with(parts, field):
    with pytest.raises(InputError, match="`timestep` must be given"):
        OTGuidance(*parts, num_correction_steps=2, guidance_field=field).correct(_blurred(2))
    network, bank = parts
    other = ReferenceBank.from_features(bank.features[:50])
    with pytest.raises(InputError, match="`guidance_field` must be recorded with references of shape"):
        OTGuidance(network, other, num_correction_steps=2, guidance_field=field)


# --- the mass of references -----------------------------------------------------------------------------------------


class _Pixels(ConvFeatureExtractor):
    """The image itself as its features: plans can be derived by hand."""

    def forward(self, images, return_dict=True):
        features = images.flatten(1)
        return FeatureExtractorOutput(features, features) if return_dict else (features, features)


def _two_points(weights=None, counts=(1, 1), **options):
    """References that are two images, all dark or all bright (16 pixels, features in [0, 1]: distance 4)."""
    pair = torch.stack([torch.full((1, 4, 4), -1.0), torch.full((1, 4, 4), 1.0)])
    images = pair.repeat_interleave(torch.tensor(counts), dim=0)
    network = _Pixels(sample_size=4, feature_dim=16)
    features = network.extract(images)
    return network, ReferenceBank.from_features(features, feature_scale=4.0, images=images, weights=weights, **options)


def _grey(count: int) -> torch.Tensor:
    return 0.1 * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))


SHARES = torch.tensor([0.9, 0.1])


@pytest.mark.parametrize("kind", [OTGuidance, "fixed"])
def test_images_end_in_the_proportions_of_the_weights(kind):
    """Two point masses .9 and .1: of 40 grey images, 36 turn dark and 4 bright. One image may split its mass."""
    kind = _Fixed if kind == "fixed" else kind
    guidance = kind(*_two_points(SHARES), num_correction_steps=30, blur=0.1)
    moved = guidance.correct(_grey(40)).mean((1, 2, 3))
    assert (moved.abs() > 0.9).sum() >= 39
    assert abs(int((moved > 0).sum()) - 4) <= 1


@pytest.mark.parametrize("pixel_weight", [0, 1])
def test_a_step_is_half_of_the_displacement_of_the_plan(pixel_weight):
    """The destination of a single grey image is the weighted mean, .9 · (−1) + .1 · 1 = −.8, in both of its parts."""
    options = {"num_correction_steps": 1, "step_rule": "displacement", "pixel_weight": pixel_weight}
    moved = OTGuidance(*_two_points(SHARES), **options).correct(torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(moved, torch.full((1, 1, 4, 4), -0.4), atol=1e-4, rtol=0)  # tolerance of the solver


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("options", [{}, {"metric": "mmd"}, {"reach": 2.0}, {"history": []}])
def test_weights_are_repetitions(options, labelled):
    """A mass of 2 is a reference twice: joint, by class, by a kernel, unbalanced, and in a recorded field."""
    labels = {"labels": torch.tensor([0, 0])} if labelled else {}
    repeated = {"labels": torch.tensor([0, 0, 0])} if labelled else {}
    of_images = {"class_labels": torch.zeros(12, dtype=torch.long)} if labelled else {}
    results = []
    for parts in (_two_points(torch.tensor([2.0, 1.0]), **labels), _two_points(counts=(2, 1), **repeated)):
        own = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        guidance = OTGuidance(*parts, blur=0.3, num_correction_steps=3, **own)
        result = [guidance.correct(_grey(12), 500, **of_images)]
        if "history" in options:
            field = guidance.recorded_field()
            labels_of_one = {name: value[:1] for name, value in of_images.items()}
            result.append(OTGuidance(*parts, guidance_field=field).correct(_grey(13)[12:], 500, **labels_of_one))
        results.append(result)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # the tolerance of the solver


def test_reach_leaves_outliers_among_the_references_alone():
    """With a tenth of the references far away, a balanced plan sends a tenth of the images there, others none."""
    parts, options = _two_points(SHARES), {"num_correction_steps": 30, "blur": 0.3}
    far = {reach: OTGuidance(*parts, reach=reach, **options).correct(_grey(40) - 0.8) for reach in (None, 0.3)}
    assert (far[None].mean((1, 2, 3)) > 0).float().mean() == pytest.approx(0.1, abs=0.03)
    assert (far[0.3].mean((1, 2, 3)) > -0.5).sum() == 0


def test_a_bank_keeps_its_weights_and_old_banks_load(tmp_path):
    _, bank = _two_points(torch.tensor([9.0, 1.0]))
    bank.half().save_pretrained(tmp_path / "weighted")
    loaded = ReferenceBank.from_pretrained(tmp_path / "weighted")
    torch.testing.assert_close(loaded.masses(), SHARES, atol=1e-3, rtol=0)  # half precision
    _, bank = _two_points()
    bank.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["has_weights"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert ReferenceBank.from_pretrained(tmp_path / "old").masses() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _two_points(torch.tensor([1.0, 0.0])), "`weights` must be positive, got 0.0"),
        (lambda: _two_points(torch.ones(3)), "`weights` must be 2 numbers"),
        (lambda: OTGuidance(*_two_points(), reach=0), "`reach` must be a positive length or None, got 0"),
        (lambda: OTGuidance(*_two_points(), reach=1, history=[]), "`reach` must be None for mmd, and where"),
    ],
)
def test_weights_and_reach_out_of_range_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
