"""OT guidance: move a batch of predicted clean images towards the distribution of real images.

One correction is a few gradient steps on the images that reduce the Sinkhorn divergence between the batch and a
reference set R:

    x̂0 ← clamp(x̂0 − η s'² B ∇S(ψ(x̂0), ψ(R)), −1, 1),     ψ(x) = (φ(x)/s, w·θ(x)/s') / √(1 + w²)

φ is the frozen feature network, θ a thumbnail of at most 8 × 8 pixels, s and s' are their median distances, w is the
`pixel_weight`, B the batch size, and η half the `guidance_scale`. B ∇S is the displacement of an image from its
destination in the transport plan, so that whatever is already right does not move, not even the background of a wrong
image. With w = 0 the objective cannot see pixel artefacts left by guidance; thumbnails make them visible.

`step_rule="adam"` is the original study's form: Adam divides the gradient by its own magnitude, so that every pixel
moves by about `guidance_scale` · 0.02 in each step. At 0.5 this is the original study's learning rate of 0.01.

`metric="mmd"` follows the gradient of a kernel discrepancy in place of the divergence, as MMD guidance does
(`ot_diffusers.transport.mmd_displacement`); it is there for comparison.

With labels there is a transport problem for each class, between the images and the references of that class; the
classes of a batch are solved together.

The gradient comes either from a transport problem of the batch, solved anew at every step, or from a `GuidanceField`,
which was recorded on a large batch and moves every image independently.

In latent diffusion x̂0 is a latent z with the image x = D(z). The displacement d is carried back to the pixels,
g = (∂ψ/∂x)ᵀ d, and through the decoder to the latent, u = (∂ψ/∂z)ᵀ d. The step

    z ← z − η s'² (‖g‖² / ‖u‖²) u

makes the progress in ψ that the step of pixels makes, to first order: ⟨d, ∂ψ⟩ = −η s'² ‖g‖² in both. It is therefore
the same step where the decoder is orthogonal, and does not depend on the units of the latents, which are not clamped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import require, require_integer, require_number
from .images import thumbnails
from .models.feature_extractor import FeatureExtractor
from .models.guidance_field import Correction, GuidanceField, completed, completed_mass
from .models.reference_bank import ReferenceBank
from .transport import DivergencePotentials, divergence_gradient, mmd_displacement

if TYPE_CHECKING:
    from typing import Self

# At guidance_scale=1: Adam's learning rate, in pixel units of [-1, 1], …
PIXELS_PER_STEP = 0.02
# … and the fraction of its displacement that an image moves in one step.
SHARE_PER_STEP = 0.5
# Where features change fast, a step is shortened to this multiple of the displacement in feature space.
LONGEST_STEP = 1.5
# Images without negative pixels and with a pixel above this are taken for images in [0, 255].
FARTHEST_PIXEL = 2.0
STEP_RULES = ("displacement", "adam")
METRICS = ("sinkhorn", "mmd")
# Fixed Sinkhorn iterations on a GPU: for the first correction, and for warm-started ones. They suffice from this blur
# on, in units of the median distance.
COLD_ITERATIONS, WARM_ITERATIONS, SMALLEST_BLUR = 20, 10, 0.3
# Pixel values that pass through the feature network at once on a CPU: 50 images of 32 × 32 in colour.
CPU_VALUES = 153_600
# A latent, nominally of unit variance, moves in one step by at most this root mean square, or this multiple of its
# length. The step would have no bound where the decoder hardly changes along u.
LONGEST_MOVE = 0.25
# The blur by default, in units of the median distance, and that of fewer images or references. These are so far apart
# that at a smaller blur images crowd around the references.
BLUR, BLUR_OF_FEW = 0.3, 0.6
FEW_IMAGES, FEW_REFERENCES = 100, 500
# Correction steps, and those towards weighted references, at this `guidance_scale`: an image moves further than usual,
# as it may change its class.
CORRECTIONS, CORRECTIONS_OF_SHARES, SCALE_OF_SHARES = 3, 6, 2.0
# Settings that a guidance field stores in addition to `guidance_scale` and `num_correction_steps`.
RECORDED = ("blur", "normalize_features", "pixel_weight", "step_rule")

# The displacement of each row of features, [B, D], in the correction step of this index.
Displaced = Callable[[Tensor, int], Tensor]


class OTGuidance:
    """Corrects x̂0, in a pipeline or in your own sampling loop.

    Equal calls of `correct` give equal images: no state is kept between calls, except inside `chain()`, where the
    potentials of one correction warm-start the next. This is faster, and is meant for one chain at a time.

    Without a guidance field the transport problem couples the batch: an image depends on the other images, and guidance
    improves with the batch size (a batch of one is pulled towards the mean of the data). With a guidance field, each
    image moves independently, and only at times near those of the field. With labels, the images of a class are a batch
    of their own.

    Args:
        feature_extractor: frozen network; its parameters and their gradients are not changed.
        reference_bank: the reference set, with features from the same network.
        guidance_scale: strength, ≥ 0; 0 returns the images unchanged.
        num_correction_steps: gradient steps in one correction; by default 3, or 6 towards weighted references.
        blur: length in units of normalised features (of raw features with `normalize_features=False`). By default .3,
            or .6 where fewer than 100 images or 500 references are compared, in the batch or on average in its classes.
            Towards weighted references it is always .3, because a larger one mixes the classes.
        normalize_features: divide features by the `feature_scale` of the reference set (median distance 1); `False` is
            the original study's form.
        pixel_weight: weight of the thumbnails relative to the features, ≥ 0; by default 1 if the reference set has
            thumbnails and features are normalised, else 0.
        reach: length in the units of `blur` beyond which a reference has little effect, by unbalanced transport, so
            that outliers among the references are ignored; None, the default, gives every reference its whole mass.
            There is no guidance field with it.
        metric: `"sinkhorn"`, the Sinkhorn divergence, or `"mmd"`, for which there is no guidance field and no blur.
        step_rule: `"displacement"` or `"adam"`; by default the first if `pixel_weight` is positive, else the second.
        guidance_field: follow this guidance field; the arguments above must be those of its recording.
        history: a list to which every correction of a joint batch is appended.
        decode: for latent diffusion, a differentiable function from latents, float32 [B, c, h, w], to images
            [B, C, H, W], nominally in [-1, 1]. x̂0 is then a latent, of any range.
        decode_batch_size: number of latents that `decode` is given at once, ≥ 1; all by default. The images of the
            whole batch are compared, but only so many have a graph at a time, which bounds the memory.

    Raises:
        InputError: components that do not fit together, or values out of range.

    Example:
        >>> from ot_diffusers import ConvFeatureExtractor, OTGuidance, ReferenceBank
        >>> network = ConvFeatureExtractor(sample_size=8, feature_dim=32)
        >>> bank = ReferenceBank.from_features(network.extract(torch.rand(64, 1, 8, 8) * 2 - 1), feature_scale=0.1)
        >>> guidance = OTGuidance(network, bank)
        >>> images = torch.zeros(16, 1, 8, 8)
        >>> 0 < (guidance.correct(images) - images).abs().max().item() <= 0.0601
        True
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor,
        reference_bank: ReferenceBank,
        *,
        guidance_scale: float = 1.0,
        num_correction_steps: int | None = None,
        blur: float | None = None,
        normalize_features: bool = True,
        pixel_weight: float | None = None,
        step_rule: str | None = None,
        metric: str = "sinkhorn",
        reach: float | None = None,
        guidance_field: GuidanceField | None = None,
        history: list[Correction] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        decode_batch_size: int | None = None,
    ) -> None:
        require_number("guidance_scale", guidance_scale, at_least=0)
        if num_correction_steps is None:
            own = CORRECTIONS_OF_SHARES if reference_bank.config.has_weights else CORRECTIONS
            num_correction_steps = own if guidance_field is None else guidance_field.config.num_correction_steps
        require_integer("num_correction_steps", num_correction_steps, at_least=1)
        if decode_batch_size is not None:
            require_integer("decode_batch_size", decode_batch_size, at_least=1)
        if blur is not None:
            require_number("blur", blur, at_least=0)
            require(blur > 0, "blur", "be a positive length", blur)
        require(metric in METRICS, "metric", f"be one of {', '.join(METRICS)}", metric)
        joint = guidance_field is None and history is None
        plan = metric == "sinkhorn" or joint
        require(plan, "metric", "be sinkhorn where a guidance field is recorded or followed", metric)
        if reach is not None:
            require_number("reach", reach, at_least=0)
            require(reach > 0, "reach", "be a positive length or None", reach)
            possible = joint and metric == "sinkhorn"
            require(possible, "reach", "be None for mmd, and where a guidance field is recorded or followed", reach)
        check_same_data(feature_extractor, reference_bank)
        self.metric, self.reach = metric, reach
        self.feature_extractor = feature_extractor
        self.guidance_field = guidance_field
        self.history = history
        self.decode = decode
        self.decode_batch_size = decode_batch_size
        self.guidance_scale = guidance_scale
        self.num_correction_steps = num_correction_steps
        if blur is None and guidance_field is not None:
            blur = guidance_field.config.blur
        elif blur is None and not normalize_features:
            blur = BLUR
        self.blur = blur
        self.normalize_features = normalize_features
        self.feature_scale = reference_bank.config.feature_scale if normalize_features else 1.0
        self.pixel_weight = chosen_pixel_weight(pixel_weight, reference_bank, normalize_features)
        self.step_rule = chosen_step_rule(step_rule, reference_bank, self.pixel_weight)
        if guidance_field is not None:
            names = ("guidance_scale", "num_correction_steps", *RECORDED)
            check_recorded_for(guidance_field, reference_bank, **{name: getattr(self, name) for name in names})
        self.pixel_scale = reference_bank.config.pixel_scale
        self.thumbnail_size = (reference_bank.config.thumbnail_shape or (0, 0, 0))[1:]
        self._potentials: DivergencePotentials | None = None
        self._in_chain = False
        self._reference_labels, self._num_classes = reference_bank.labels, reference_bank.config.num_classes
        self._groups: tuple[Tensor, ClassGroups] | None = None
        self._references = self._beside_pixels(reference_bank.features.detach().float(), reference_bank.thumbnails)
        self._masses = reference_bank.masses()
        _require_finite("reference_bank", "hold finite features", self._references)

    @contextmanager
    def chain(self) -> Iterator[Self]:
        """A context for the successive corrections of one chain of one batch.

        Example:
            >>> from ot_diffusers import ConvFeatureExtractor, OTGuidance, ReferenceBank
            >>> network = ConvFeatureExtractor(sample_size=8, feature_dim=32)
            >>> bank = ReferenceBank.from_features(network.extract(torch.rand(64, 1, 8, 8) * 2 - 1))
            >>> images = torch.zeros(16, 1, 8, 8)
            >>> with OTGuidance(network, bank).chain() as guidance:
            ...     for timestep in (800, 600, 400):
            ...         images = guidance.correct(images, timestep)
        """
        self._potentials, self._in_chain = None, True
        try:
            yield self
        finally:
            self._potentials, self._in_chain, self._groups = None, False, None

    def correct(
        self,
        pred_original_sample: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The corrected batch.

        Args:
            pred_original_sample: x̂0, [B, C, H, W], floating point, nominally in [-1, 1]; with `decode` a latent.
            timestep: time of the denoising step, as the denoiser is given it, needed to follow or record a guidance
                field. Far from all times of the field (`GuidanceField.index_of`) the images are returned unchanged.
            class_labels: class of each image, integers [B], for a reference set with labels: the images of each class
                are moved towards the references of this class.

        Returns:
            [B, C, H, W], same dtype, detached; images in [-1, 1], latents in any range. The method works inside
            `no_grad` and `inference_mode`, and does not change the gradient mode.

        Raises:
            InputError: images of a wrong shape or range. The range is not checked on a GPU, which would need a
                host–device synchronisation. Labels for references without, or a class without references.
        """
        _check_images(pred_original_sample, has_range=self.decode is None)
        has_classes = self.guidance_field is not None and self.guidance_field.labels is not None
        told = self.guidance_field is None or has_classes == (class_labels is not None)
        require(told, "class_labels", "be given to follow a field of classes, and no other", class_labels)
        groups = None if class_labels is None else self._class_groups(class_labels, pred_original_sample)
        needs_timestep = self.guidance_field is not None or self.history is not None
        require(
            timestep is not None or not needs_timestep,
            "timestep",
            "be given to follow or record a guidance field",
            timestep,
        )
        step: float | None = None
        if timestep is not None and needs_timestep:
            step = timestep.item() if isinstance(timestep, Tensor) else timestep
        field = self.guidance_field
        is_outside_field = field is not None and step is not None and field.index_of(step) is None
        if self.guidance_scale == 0 or is_outside_field:
            return pred_original_sample
        if not self._in_chain:
            self._potentials = None
        device = pred_original_sample.device
        references = self._references.to(device)
        self._masses = None if self._masses is None else self._masses.to(device)

        def displaced(features: Tensor, correction: int) -> Tensor:
            _require_finite("feature_extractor", "give finite features", features)
            return self._displacement(features.detach(), references, step, correction, groups)

        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type=device.type, enabled=False),
        ):
            correct = self._correct_images if self.decode is None else self._correct_latents
            corrected = correct(pred_original_sample.detach().clone().float(), displaced)
        return corrected.to(pred_original_sample.dtype)

    def _correct_images(self, images: Tensor, displaced: Displaced) -> Tensor:
        """The corrected images."""
        optimizer = self._optimizer(images.requires_grad_())
        for correction in range(self.num_correction_steps):
            features = self.features(images)
            displacement = displaced(features, correction)
            (gradient,) = torch.autograd.grad(features, images, grad_outputs=displacement)
            images.grad = self._bounded(gradient, displacement)
            optimizer.step()
            images.data.clamp_(-1, 1)
        return images.detach()

    def _correct_latents(self, latents: Tensor, displaced: Displaced) -> Tensor:
        """The corrected latents. The step rule gives a step of the decoded images, and each latent goes along its own
        gradient until it makes the progress of that step."""
        step, optimizer = torch.empty(0), None
        for correction in range(self.num_correction_steps):
            with torch.no_grad():
                features = self.features(latents)
            displacement = displaced(features, correction)
            gradient, latent_gradient = self._pulled_back(latents, displacement)
            if optimizer is None:
                step = torch.zeros_like(gradient)
                optimizer = self._optimizer(step)
            step.zero_().grad = self._bounded(gradient, displacement)
            optimizer.step()
            progress = -(step * gradient).flatten(1).sum(1)
            limit = LONGEST_MOVE * _lengths(latents).clamp(min=latents[0].numel() ** 0.5)
            latents = latents - _along(latent_gradient, progress, limit)
        return latents

    def _pulled_back(self, latents: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients Jᵀd of the decoded images and of the latents; only `decode_batch_size` rows at a time have a
        graph, since the displacements of all are known."""
        gradients = []
        for part, rows in zip(self._parts(latents), self._parts(displacement), strict=True):
            leaf = part.detach().clone().requires_grad_()
            images = self._decoded(leaf)
            gradients.append(torch.autograd.grad(self._points(images), (images, leaf), grad_outputs=rows))
        of_images, of_latents = zip(*gradients, strict=True)
        return torch.cat(of_images), torch.cat(of_latents)

    def recorded_field(self) -> GuidanceField:
        """The guidance field of the corrections in `history`, for an object that corrected one chain.

        Raises:
            InputError: no corrections.
        """
        arguments = {name: getattr(self, name) for name in ("guidance_scale", *RECORDED)}
        return GuidanceField.from_corrections(self.history or [], num_classes=self._num_classes, **arguments)

    def _optimizer(self, images: Tensor) -> torch.optim.Optimizer:
        if self.step_rule == "adam":
            return torch.optim.Adam([images], lr=self.guidance_scale * PIXELS_PER_STEP, fused=images.is_cuda)
        return torch.optim.SGD([images], lr=self._step_size)

    @property
    def _step_size(self) -> float:
        """η s'² of displacement steps."""
        return self.guidance_scale * SHARE_PER_STEP * self.pixel_scale**2

    def _bounded(self, gradient: Tensor, displacement: Tensor) -> Tensor:
        """The gradient Jᵀd of each image, shortened where its step −η s'² JJᵀd in feature space far exceeds d."""
        if self.step_rule == "adam":
            return gradient
        pull, distance = (part.flatten(1).square().sum(1) for part in (gradient, displacement))  # squared lengths
        progress = self._step_size * pull / distance.clamp(min=torch.finfo(distance.dtype).tiny)
        return gradient / (progress / LONGEST_STEP).clamp(min=1)[:, None, None, None]

    def _class_groups(self, class_labels: Tensor, images: Tensor) -> ClassGroups:
        """The groups of a batch with these labels; within a chain, those of its last correction for the same tensor."""
        known = self._reference_labels
        require(known is not None, "class_labels", "be none for a reference set without labels", class_labels)
        if not self._in_chain or self._groups is None or self._groups[0] is not class_labels:
            fits = tuple(class_labels.shape) == (len(images),)
            require(fits, "class_labels", f"have shape ({len(images)},)", tuple(class_labels.shape))
            assert known is not None
            self._groups = class_labels, ClassGroups.of(class_labels, known, images.device, self._masses)
            self._potentials = None
        return self._groups[1]

    def _displacement(
        self,
        features: Tensor,
        references: Tensor,
        step: float | None,
        correction: int,
        groups: ClassGroups | None,
    ) -> Tensor:
        """The displacement of each point from its destination, [B, D]: from the batch's plan or the guidance field."""
        if groups is not None and self.guidance_field is None:
            return self._displacement_in_groups(features, references, step, groups)
        if self.guidance_field is not None:
            assert step is not None
            members = None if groups is None else groups.members
            return self.guidance_field.gradient(
                features, references, timestep=step, correction=correction, members=members, masses=self._masses
            )
        if self.metric == "mmd":
            return mmd_displacement(features, references, self._masses)
        cloud, weights = (features, None) if self.history is None else completed(features, references, self._masses)
        blur = self._chosen_blur(len(features), len(references), has_weights=self._masses is not None)
        gradient, solved = self._solved(cloud, references, weights, self._masses, blur)
        if self.history is not None:
            assert step is not None
            self.history.append(Correction(step, features, solved))
        scale = len(features) if weights is None else 1 / weights[0]
        return gradient[: len(features)] * scale

    def _displacement_in_groups(
        self, features: Tensor, references: Tensor, step: float | None, groups: ClassGroups
    ) -> Tensor:
        """The same, [B, D], where the points of each class are moved towards the references of the class."""
        if self.metric == "mmd":
            moved = torch.empty_like(features)
            for _, rows, others in groups.members:
                masses = None if self._masses is None else self._masses[others] / self._masses[others].sum()
                moved[rows] = mmd_displacement(features[rows], references[others], masses)
            return moved
        cloud, weights, targets = features[groups.rows], groups.weights, references[groups.reference_rows]
        if self.history is not None:
            assert self._num_classes is not None
            shares = [completed_mass(len(rows), self._num_classes) for _, rows, _ in groups.members]
            mass, rest = torch.tensor(shares).to(weights).T
            cloud = torch.cat([cloud, targets], dim=1)
            weights = torch.cat([weights * mass[:, None], groups.reference_weights * rest[:, None]], dim=1)
        num_groups = len(groups.members)
        num_references = sum(len(others) for *_, others in groups.members)
        blur = self._chosen_blur(len(features) / num_groups, num_references / num_groups)
        gradient, solved = self._solved(cloud, targets, weights, groups.reference_weights, blur)
        displacement, classes, places = gradient / weights[..., None], *groups.places
        if self.history is not None:
            assert step is not None
            potentials = groups.flattened(solved, len(references))
            self.history.append(Correction(step, features, potentials, groups.labels))
        return displacement[classes, places]

    def _solved(
        self, cloud: Tensor, targets: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, blur: float
    ) -> tuple[Tensor, DivergencePotentials]:
        """∂S/∂x of a cloud of images and its targets, or of a batch of such problems, and the potentials, from which
        the next correction starts."""
        initial = self._warm_start(cloud.shape[:-1], cloud.device)
        gradient, potentials = divergence_gradient(
            cloud,
            targets,
            blur=blur,
            reach=self.reach,
            x_weights=x_weights,
            y_weights=y_weights,
            initial=initial,
            num_iterations=self._num_iterations(blur, cloud.device, initial is not None),
        )
        self._potentials = potentials
        return gradient, potentials

    def _warm_start(self, shape: torch.Size, device: torch.device) -> DivergencePotentials | None:
        """The last potentials, if they fit a cloud of this shape, [N] or [P, N]: they only speed up the solver and do
        not change the solution."""
        last = self._potentials
        fits = last is not None and last.self_potential.shape == shape and last.self_potential.device == device
        return last if fits else None

    def _chosen_blur(self, num_images: float, num_references: float, *, has_weights: bool = False) -> float:
        """The blur that was given, or the default where so many are compared. A recording completes few images by
        references, and keeps one blur."""
        if self.blur is not None:
            return self.blur
        if self.history is None:
            return default_blur(num_images, num_references, has_weights=has_weights)
        self.blur = default_blur(math.inf, num_references, has_weights=has_weights)
        return self.blur

    def _num_iterations(self, blur: float, device: torch.device, is_warm: bool) -> int | None:
        """Number of Sinkhorn iterations; None (to convergence) on a CPU, or if no tested number suffices."""
        tested = self.normalize_features and blur >= SMALLEST_BLUR and self._masses is None and self.reach is None
        if device.type == "cpu" or not tested:
            return None
        return WARM_ITERATIONS if is_warm else COLD_ITERATIONS

    def features(self, images: Tensor) -> Tensor:
        """ψ(x) of images in [-1, 1] or ψ(D(z)) of latents: points of the transport problem, float32 [B, D], or
        [B, D + D'] with pixels."""
        if self.decode is None:
            return self._points(images)
        return torch.cat([self._points(self._decoded(part)) for part in self._parts(images)])

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of latents, or of what belongs to them, that are decoded at once."""
        return rows.split(self.decode_batch_size or len(rows))

    def _decoded(self, latents: Tensor) -> Tensor:
        """The images of latents, clamped to [-1, 1]. As where pixels are corrected, the gradient passes the bounds."""
        assert self.decode is not None
        images = self.decode(latents).float()
        return images + (images.clamp(-1, 1) - images).detach()

    def _points(self, images: Tensor) -> Tensor:
        """ψ(x) of images in [-1, 1]."""
        # On a CPU, small parts reuse caches and memory and are faster; an accelerator takes the whole batch.
        rows = max(1, CPU_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
        parts = images.to(self.feature_extractor.dtype).split(rows)
        features = torch.cat([self.feature_extractor.extract(part) for part in parts]).float()
        return self._beside_pixels(features, thumbnails(images.float()) if self.pixel_weight > 0 else None)

    def _beside_pixels(self, features: Tensor, small: Tensor | None) -> Tensor:
        """Raw features and thumbnails of the same images, combined into points of the transport problem."""
        points = features / self.feature_scale
        if self.pixel_weight == 0:
            return points
        assert small is not None
        pixels = small.float().flatten(1) * (self.pixel_weight / self.pixel_scale)
        return torch.cat([points, pixels], dim=1) / math.sqrt(1 + self.pixel_weight**2)


@dataclass(frozen=True)
class ClassGroups:
    """The images and references of each class in a batch, as P problems of one size. Points of smaller classes repeat
    and share their weight, which leaves the problem and the displacement of a point as they are.

    Attributes:
        labels: [B], of the images.
        members: each class with the rows of its images and of its references.
        rows, weights: [P, N], of the images.
        reference_rows, reference_weights: [P, M], of the references.
        places: problem of each image and its place among the N points, [B] both.
    """

    labels: Tensor
    members: list[tuple[int, Tensor, Tensor]]
    rows: Tensor
    weights: Tensor
    reference_rows: Tensor
    reference_weights: Tensor
    places: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, labels: Tensor, reference_labels: Tensor, device: torch.device, masses: Tensor | None = None
    ) -> ClassGroups:
        """The groups of images with these labels, [B], and of references, [M], with the mass of each, equal by default.

        Raises:
            InputError: a class without references.

        Example:
            >>> groups = ClassGroups.of(torch.tensor([5, 2, 5]), torch.tensor([2, 2, 5]), torch.device("cpu"))
            >>> groups.rows, groups.reference_weights
            (tensor([[1, 1],
                    [0, 2]]), tensor([[0.5000, 0.5000],
                    [0.5000, 0.5000]]))
        """
        labels, known, members = labels.cpu(), reference_labels.cpu(), []
        for label in labels.unique().tolist():
            own, others = ((each == label).nonzero()[:, 0].to(device) for each in (labels, known))
            require(len(others) > 0, "class_labels", "be classes of the reference set", label)
            members.append((label, own, others))
        rows, weights = _repeated([own for _, own, _ in members])
        reference_rows, reference_weights = _repeated([others for *_, others in members], masses)
        problem, place = torch.empty((2, len(labels)), dtype=torch.long, device=device)
        for index, (_, own, _) in enumerate(members):
            problem[own], place[own] = index, torch.arange(len(own), device=device)
        return cls(labels, members, rows, weights, reference_rows, reference_weights, (problem, place))

    def flattened(self, potentials: DivergencePotentials, num_references: int) -> DivergencePotentials:
        """The potentials of completed clouds, [B + M] of images and references and [M] of references, in their order;
        0 for references of other classes."""
        own = potentials.self_potential
        images, width = own[self.places], self.rows.shape[1]
        among, cross = own.new_zeros(num_references), own.new_zeros(num_references)
        for index, (*_, others) in enumerate(self.members):
            among[others] = own[index, width : width + len(others)]
            cross[others] = potentials.cross.g[index, : len(others)]
        solved = dataclasses.replace(potentials.cross, g=cross)
        return DivergencePotentials(solved, torch.cat([images, among]))


def _repeated(members: Sequence[Tensor], masses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lists of rows as one [P, N], shorter ones repeated to the length of the longest, and the weights of the rows,
    which are their share of the `masses` of the list."""
    longest, rows, weights = max(map(len, members)), [], []
    for own in members:
        index = torch.arange(longest) % len(own)
        rows.append(own[index])
        among = torch.ones(len(own)) if masses is None else masses[own].cpu()
        shares = among / among.sum()
        weights.append((shares[index] / index.bincount()[index]).to(own.device))
    return torch.stack(rows), torch.stack(weights)


def default_blur(num_images: float, num_references: float, *, has_weights: bool = False) -> float:
    """The blur at which so many images are compared with so many references, in units of the median distance.

    Example:
        >>> default_blur(1000, 2000), default_blur(64, 2000), default_blur(1000, 128)
        (0.3, 0.6, 0.6)
    """
    is_many = num_images >= FEW_IMAGES and num_references >= FEW_REFERENCES
    return BLUR if is_many or has_weights else BLUR_OF_FEW


def chosen_pixel_weight(pixel_weight: float | None, reference_bank: ReferenceBank, normalize_features: bool) -> float:
    """The given weight, if the reference set allows it, or the default.

    Raises:
        InputError: a negative weight, or a positive weight for a reference set without thumbnails.
    """
    if pixel_weight is None:
        return 1.0 if reference_bank.thumbnails is not None and normalize_features else 0.0
    require_number("pixel_weight", pixel_weight, at_least=0)
    possible = pixel_weight == 0 or reference_bank.thumbnails is not None
    require(possible, "pixel_weight", "be 0 for a reference set without thumbnails", pixel_weight)
    return pixel_weight


def chosen_step_rule(step_rule: str | None, reference_bank: ReferenceBank, pixel_weight: float) -> str:
    """The given step rule, if the reference set allows it, or the default.

    Raises:
        InputError: an unknown rule, or `"displacement"` for a reference set without thumbnails, whose `pixel_scale` is
            unknown.
    """
    if step_rule is None:
        return "displacement" if pixel_weight > 0 else "adam"
    require(step_rule in STEP_RULES, "step_rule", f"be one of {', '.join(STEP_RULES)}", step_rule)
    possible = step_rule == "adam" or reference_bank.thumbnails is not None
    require(possible, "step_rule", "be adam for a reference set without thumbnails", step_rule)
    return step_rule


def check_takes(feature_extractor: FeatureExtractor, image_shape: Sequence[int], argument: str) -> None:
    """Raise `InputError` unless the network takes images of `image_shape`, [C, H, W]; a backbone takes any size."""
    hint = "" if image_shape[0] in (1, 3) else " (latents need a `vae`)"
    network_shape = feature_extractor.image_shape
    if network_shape is not None:
        requirement = f"take images of shape {tuple(image_shape)}, as the pipeline generates them{hint}"
        require(network_shape == tuple(image_shape), argument, requirement, network_shape)
    else:
        require(
            image_shape[0] in (1, 3), argument, f"be left out for images without 1 or 3 channels{hint}", image_shape
        )


def check_same_data(feature_extractor: FeatureExtractor, reference_bank: ReferenceBank) -> None:
    """Raise `InputError` for a reference set with features from another network."""
    network, bank = feature_extractor.config, reference_bank.config
    require(
        bank.feature_dim == network.feature_dim,
        "reference_bank",
        f"hold features of width {network.feature_dim}",
        bank.feature_dim,
    )
    comparable = bank.data_fingerprint is not None and network.data_fingerprint is not None
    require(
        not comparable or bank.data_fingerprint == network.data_fingerprint,
        "reference_bank",
        f"come from the data of the feature network ({network.dataset})",
        bank.dataset,
    )


def _along(gradient: Tensor, progress: Tensor, limit: Tensor) -> Tensor:
    """Multiples of the gradients whose scalar products with them are `progress`, [B], no longer than `limit`, [B]."""
    length = _lengths(gradient)
    factor = (progress / length).clamp(-limit, limit) / length
    return gradient * torch.where(length > 0, factor, 0.0)[:, None, None, None]


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean length of each row, [B]."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)


def _check_images(images: Tensor, *, has_range: bool) -> None:
    """Raise `InputError` for tensors that cannot be x̂0. Noise may take x̂0 far outside [-1, 1], but on both sides;
    latents have no range."""
    name = "pred_original_sample"
    require(images.is_floating_point(), name, "be floating point, in [-1, 1]", images.dtype)
    _require_finite(name, "be finite", images)
    if has_range and images.device.type == "cpu" and images.numel():
        smallest, largest = (float(bound) for bound in images.aminmax())
        in_range = smallest < 0 or largest <= FARTHEST_PIXEL
        require(in_range, name, "lie in [-1, 1]", f"values from {smallest:g} to {largest:g}")


def _require_finite(argument: str, requirement: str, tensor: Tensor) -> None:
    """Raise `InputError` for NaN and Inf on the CPU; elsewhere the check would need a host–device synchronisation."""
    require(tensor.device.type != "cpu" or bool(tensor.isfinite().all()), argument, requirement, "NaN or Inf")


def check_recorded_for(guidance_field: GuidanceField, reference_bank: ReferenceBank, **arguments: float | str) -> None:
    """Raise `InputError` for a guidance field recorded with other references, or other settings than `arguments`."""
    config, bank = guidance_field.config, reference_bank.config
    pixels = math.prod(bank.thumbnail_shape) if config.pixel_weight > 0 and bank.thumbnail_shape else 0
    recorded = (config.num_references, config.feature_dim)
    expected = (bank.num_samples, bank.feature_dim + pixels)
    require(recorded == expected, "guidance_field", f"be recorded with references of shape {expected}", recorded)
    same_classes = config.num_classes in (None, bank.num_classes)
    classes = f"with {bank.num_classes} classes" if bank.num_classes else "without classes"
    require(same_classes, "guidance_field", f"be recorded {classes}", config.num_classes)
    for name, value in arguments.items():
        require(value == config[name], name, f"be {config[name]}, as in the recording of the guidance field", value)
