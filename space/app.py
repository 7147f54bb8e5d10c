"""The same noise with and without optimal-transport guidance, on MNIST and CIFAR-10.

python space/app.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ot_diffusers import FlowMatchPipeline, OTGuidedDDIMPipeline, TruncatedPriorPipeline
from ot_diffusers.sampling import image_grid, network_calls, sample_images

NUM_IMAGES, IMAGES_OF_CLASS = 36, 16  # guidance by class compares the images of each with real ones
MODELS = Path(__file__).parent.parent / "model_cards"
MNIST, CIFAR10 = "Digits (MNIST, 28×28)", "Photographs (CIFAR-10, 32×32)"
FEW_CALLS, ONE_CALL = "Digits in few steps (MNIST, 16×16)", "Digits in one step (MNIST, 16×16)"
CLASSES, EVERY = "Digits that you choose (MNIST, 16×16)", "every class"


@dataclass(frozen=True)
class Model:
    """A published pipeline and the steps that it is offered with: the first number is the default."""

    pipeline: Any
    steps: tuple[int, ...]
    about: str


def load(kind: type[Any], name: str) -> Any:
    """The model in a clone of the repository, else on the Hub."""
    pipeline = kind.from_pretrained(str(MODELS / name) if (MODELS / name).is_dir() else f"ot-diffusers/{name}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL_OF = {
    MNIST: Model(
        load(OTGuidedDDIMPipeline, "mnist-ot-guided"),
        (20, 10, 50),
        "A small UNet, sampled by DDIM from pure noise.",
    ),
    FEW_CALLS: Model(
        load(FlowMatchPipeline, "mnist16-coupled"),
        (2, 1, 4, 8),
        "Noise and images were paired by optimal transport between noise and the whole data set, so that one or two "
        "steps are enough.",
    ),
    ONE_CALL: Model(
        load(FlowMatchPipeline, "mnist16-one-call"),
        (1,),
        "The network for few steps, tuned by optimal transport on its finished samples: a single call makes an image.",
    ),
    CLASSES: Model(
        load(FlowMatchPipeline, "mnist16-classes"),
        (4, 1, 2, 8),
        "The network is told which digit to make. Noise and images were paired by optimal transport within each class, "
        "so that a few steps are enough and the digit is the one that you choose. Guidance compares the images of each "
        "digit with real ones.",
    ),
    CIFAR10: Model(
        load(TruncatedPriorPipeline, "cifar10-truncated-prior"),
        (10, 5, 20),
        "A prior generates rough images in one network call, noise is added up to step T', and the denoiser takes the "
        "steps from there. Both networks are small and were trained for minutes on a CPU, so the pictures are far from "
        "photographs.",
    ),
}
LONGEST = MODEL_OF[CIFAR10].pipeline.truncation_timestep
SPACING = max(MODEL_OF[CIFAR10].steps)  # every offered number of steps divides every offered T'


def generate(
    name: str, class_name: str, seed: float, steps: int, guidance_scale: float, start: float
) -> Iterator[list[Any]]:
    """Picture and cost without guidance, then those with guidance as well."""
    pipeline = MODEL_OF[name].pipeline
    if name == CIFAR10:
        pipeline = pipeline.at_truncation_timestep(int(start))
        pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_images": NUM_IMAGES, "seed": int(seed), "num_inference_steps": int(steps)}
    classes = pipeline.classes
    if classes is not None and class_name == EVERY:
        call["class_labels"] = [label for label in range(len(classes)) for _ in range(IMAGES_OF_CLASS)]
        call["num_images"] = len(call["class_labels"])
    elif classes is not None:
        call["class_labels"] = class_name
    plain = sample(pipeline, guidance_scale=0, **call)
    yield [*plain, None, "Guided images follow."]
    yield [*plain, *sample(pipeline, guidance_scale=guidance_scale, **call)]


def sample(pipeline: Any, num_images: int, **call: Any) -> tuple[PIL.Image.Image, str]:
    """A grid of samples, with a row for each class where they are of several, and what they cost."""
    started = time.monotonic()
    images = sample_images(pipeline, num_images, **call)
    seconds = time.monotonic() - started
    calls = network_calls(pipeline)
    cost = f"{calls} network call{'s' * (calls > 1)} for each image, {seconds:.1f} s for {num_images} images"
    return image_grid(images, None if num_images == NUM_IMAGES else IMAGES_OF_CLASS), cost


def choose(name: str) -> list[Any]:
    """The controls of a model, with its defaults."""
    model = MODEL_OF[name]
    names = list(model.pipeline.labels)
    return [
        gr.Dropdown(choices=[EVERY, *names], value=EVERY, visible=bool(names)),
        gr.Radio(choices=sorted(model.steps), value=model.steps[0]),
        gr.Slider(visible=name == CIFAR10),
        model.about,
    ]


with gr.Blocks(title="Optimal transport in diffusion models") as app:
    gr.Markdown(
        "# Optimal transport in diffusion models\n"
        "Both pictures start from the same noise. With guidance, the predicted clean images of the whole batch are "
        "moved towards the distribution of real images during sampling. The time includes the feature network, which "
        "guidance calls in addition."
    )
    model = gr.Radio([*MODEL_OF], value=MNIST, label="Model", elem_id="model")
    about = gr.Markdown(MODEL_OF[MNIST].about, elem_id="about")
    with gr.Row():
        class_name = gr.Dropdown([EVERY], value=EVERY, label="Class", elem_id="class", visible=False, min_width=240)
        offered = MODEL_OF[MNIST].steps
        steps = gr.Radio(sorted(offered), value=offered[0], label="Denoising steps", elem_id="steps", min_width=240)
        scale = gr.Slider(0, 3, value=1, step=0.1, label="Guidance scale", elem_id="scale", min_width=240)
        start = gr.Slider(
            SPACING, LONGEST, value=LONGEST, step=SPACING, label="First step T'", elem_id="start", visible=False,
            min_width=240,
        )  # fmt: skip
        seed = gr.Slider(0, 100, value=0, step=1, label="Random seed", elem_id="seed", min_width=240)
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    outputs: list[Any] = []
    with gr.Row():
        for key, title in {"plain": "Without guidance", "guided": "With guidance"}.items():
            with gr.Column(min_width=320):
                gr.Markdown(f"### {title}")
                picture = gr.Image(
                    show_label=False,
                    elem_id=key,
                    format="png",
                    buttons=[],
                    interactive=False,
                    height="min(400px, 88vw)",
                )
                outputs += [picture, gr.Markdown(elem_id=f"{key}-cost")]
    controls = [model, class_name, seed, steps, scale, start]
    chosen = model.change(choose, inputs=model, outputs=[class_name, steps, start, about])
    for event in (button.click, chosen.then, app.load):
        event(generate, inputs=controls, outputs=outputs)

if __name__ == "__main__":
    app.launch()
