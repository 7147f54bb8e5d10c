"""The same noise three ways: plain DDIM, OT guidance, and a chain that starts late from a prior.

python space/app.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ot_diffusers import OTGuidedDDIMPipeline, TruncatedPriorPipeline, truncated_scheduler
from ot_diffusers.sampling import image_grid, network_calls, sample_images

NUM_IMAGES = 64
TRUNCATED_STEPS = 10
MODELS = Path(__file__).parent.parent / "model_cards"


def source(name: str) -> str:
    """The model in a clone of the repository, else on the Hub."""
    return str(MODELS / name) if (MODELS / name).is_dir() else f"ot-diffusers/{name}"


guided = OTGuidedDDIMPipeline.from_pretrained(source("digits-ot-guided"))
truncated = TruncatedPriorPipeline.from_pretrained(source("digits-truncated-prior"))
for loaded in (guided, truncated):
    loaded.set_progress_bar_config(disable=True)


def truncated_at(truncation_timestep: int) -> TruncatedPriorPipeline:
    """The chain from step T' of the full one; the prior makes clean images, so it serves any T'."""
    prior = truncated.prior.at_truncation_timestep(truncation_timestep)
    pipeline = TruncatedPriorPipeline(prior, truncated.unet, truncated_scheduler(guided.scheduler, truncation_timestep))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any, seed: int, **call: Any) -> tuple[PIL.Image.Image, str]:
    """A grid of samples, and what they cost."""
    started = time.monotonic()
    images = sample_images(pipeline, NUM_IMAGES, seed=seed, **call)
    seconds = time.monotonic() - started
    return image_grid(images), f"{network_calls(pipeline)} network calls an image, {seconds:.1f} s for {NUM_IMAGES}"


def generate(seed: float, num_inference_steps: int, guidance_scale: float, truncation_timestep: int) -> list[Any]:
    """Grid and cost of each of the three."""
    seed = int(seed)
    steps = {"num_inference_steps": int(num_inference_steps)}
    return [
        *picture(guided, seed, guidance_scale=0, **steps),
        *picture(guided, seed, guidance_scale=guidance_scale, **steps),
        *picture(truncated_at(int(truncation_timestep)), seed, num_inference_steps=TRUNCATED_STEPS),
    ]


with gr.Blocks(title="Optimal transport in diffusion models") as app:
    gr.Markdown(
        "# Optimal transport in diffusion models\n"
        "Handwritten digits of 8×8 pixels from the same noise. **OT-guided** moves the predicted clean images of the "
        "whole batch towards the distribution of real digits; **truncated** starts at step T' from a prior that makes "
        "an image in one call."
    )
    with gr.Row():
        seed = gr.Slider(0, 100, value=0, step=1, label="Seed", elem_id="seed")
        steps = gr.Slider(5, 100, value=50, step=5, label="Steps (baseline, OT-guided)", elem_id="steps")
        scale = gr.Slider(0, 3, value=1, step=0.1, label="Guidance scale (OT-guided)", elem_id="scale")
        start = gr.Slider(10, 300, value=10, step=10, label="T' (truncated)", elem_id="start")
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    outputs: list[Any] = []
    with gr.Row():
        for name in ("Baseline", "OT-guided", "Truncated"):
            key = name.lower()
            with gr.Column(min_width=240):
                gr.Markdown(f"### {name}")
                plain = {"show_label": False, "buttons": [], "interactive": False}
                outputs.append(gr.Image(label=name, elem_id=key, format="png", **plain))
                outputs.append(gr.Markdown(elem_id=f"{key}-cost"))
    button.click(generate, inputs=[seed, steps, scale, start], outputs=outputs)
    app.load(generate, inputs=[seed, steps, scale, start], outputs=outputs)

if __name__ == "__main__":
    app.launch()
