"""Model cards: what a pipeline is, how it was trained and how well it does, from the files of its run.

Every number comes from `run.json` and `results.json`; metadata and results are written through huggingface_hub's
`ModelCard` and `EvalResult`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import HUB_IDS
from ..errors import require
from ..evaluation.metric_table import HEADLINE, METRICS, SECOND
from ..reporting.quoting import quote
from ..reporting.report import format_number

LICENSE = "apache-2.0"
TASK = "unconditional-image-generation"
HOME = "ot-diffusers"
MARK = "<!-- Written by ot-diffusers, which replaces this card at the next push as long as this line stands. -->"


@dataclass(frozen=True)
class DataFacts:
    """What a card says of a data set.

    Attributes:
        title: its full name.
        fingerprint: of the images of its training split, as `load_images` returns them.
        limits: what a model of it cannot know.
    """

    title: str
    fingerprint: str
    limits: str


DATA = {
    HUB_IDS["digits"]: DataFacts(
        "Optical recognition of handwritten digits (UCI; scikit-learn's copy)",
        "9dfd7047b8126583a393ea6f2acd685966ed6c4994285df3768524744f34e48c",
        "1,797 grey pictures of 8×8 pixels by 13 writers: a toy that shows the method, not handwriting at large.",
    ),
    HUB_IDS["mnist"]: DataFacts(
        "MNIST",
        "4dd0ad946d6165ddb02fdfac60e262d3dfad24c121cfbf76c1c4c8fb896c73da",
        "Digits of American census workers and high-school students, centred and cleaned of noise; other ways of "
        "writing them, and other scripts, are absent.",
    ),
    HUB_IDS["cifar10"]: DataFacts(
        "CIFAR-10",
        "df6ca9fc01c95abc99fccef525fd44efc655d75b3f2fe98b0a90be4074d875d5",
        "Ten classes of photographs found on the web in the 2000s at 32×32 pixels; what the web showed too often or "
        "too rarely then, a model of it does too.",
    ),
}
"""By Hub id."""


@dataclass(frozen=True)
class Kind:
    """What a card says of a pipeline's class."""

    summary: str
    tags: tuple[str, ...]
    call: str
    papers: tuple[str, ...]


KINDS = {
    "OTGuidedDDIMPipeline": Kind(
        "An unconditional DDIM pipeline whose predicted clean images are moved, as a batch, towards the distribution "
        "of real images: down a Sinkhorn divergence between features of the batch and stored features of real images.",
        ("optimal-transport", "ddim"),
        "batch_size=64, num_inference_steps=50",
        ("song2021denoising", "feydy2019interpolating"),
    ),
    "TruncatedPriorPipeline": Kind(
        "A truncated diffusion pipeline: a prior makes the noisy image of step T' = {truncation_timestep} in one call, "
        "and the denoiser takes the last {truncation_timestep} steps from there.",
        ("optimal-transport", "truncated-diffusion"),
        "batch_size=64",
        ("zheng2022truncated", "lyu2022accelerating", "feydy2019interpolating"),
    ),
    "DDIMPipeline": Kind(
        "An unconditional DDIM pipeline.", ("ddim",), "batch_size=64, num_inference_steps=50", ("song2021denoising",)
    ),
    "DDPMPipeline": Kind("An unconditional DDPM pipeline.", ("ddpm",), "batch_size=64", ("ho2020denoising",)),
}

NOTES = {
    "OTGuidedDDIMPipeline": "Guidance couples the images of a batch, so give it 64 or more; `guidance_scale=0` turns "
    "it off. Without the package, the repository is a plain `diffusers.DDIMPipeline`.",
    "TruncatedPriorPipeline": "Each image takes one call of the prior and one of the denoiser for every step.",
}
"""What the user of a pipeline of this package has to know."""

PAPERS = {
    "ho2020denoising": "J. Ho and A. Jain and P. Abbeel|"
    "Denoising Diffusion Probabilistic Models|NeurIPS|2020|2006.11239",
    "song2021denoising": "J. Song and C. Meng and S. Ermon|Denoising Diffusion Implicit Models|ICLR|2021|2010.02502",
    "feydy2019interpolating": "J. Feydy and T. Séjourné and F.-X. Vialard and S. Amari and A. Trouvé and G. Peyré|"
    "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences|AISTATS|2019|1810.08278",
    "zheng2022truncated": "H. Zheng and P. He and W. Chen and M. Zhou|"
    "Truncated Diffusion Probabilistic Models and Diffusion-based Adversarial Auto-Encoders|ICLR|2023|2202.09671",
    "lyu2022accelerating": "Z. Lyu and X. Xu and C. Yang and D. Lin and B. Dai|"
    "Accelerating Diffusion Models via Early Stop of the Diffusion Process|arXiv preprint|2022|2205.12524",
}
"""BibTeX key to authors, title, venue, year and arXiv number; `REFERENCES.md` has the whole list."""


Records = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Part of the training procedure to `run.json` and `results.json` of the run."""


@dataclass(frozen=True)
class CardFacts:
    """All that a card is written from.

    Attributes:
        repo_id: where the snippet loads from.
        class_name: of the pipeline.
        parameters: number of parameters of each part.
        dataset: Hub id of the training data; None where it is not known to come from the Hub.
        config: configuration of the scheduler, with `truncation_timestep` for a truncated chain.
        runs: what its training runs recorded.
        results: contents of an evaluation's `results.json`, or None.
        arm: the arm of `results` that is this pipeline.
        picture: file name of a grid of samples beside the card, or None.
        weights_dtype: of the stored weights.
    """

    repo_id: str
    class_name: str
    parameters: Mapping[str, int]
    dataset: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    runs: Records = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    arm: str | None = None
    picture: str | None = None
    weights_dtype: str = "float32"


def render_card(facts: CardFacts) -> ModelCard:
    """The card, metadata and text.

    Raises:
        InputError: results without the arm.

    Example:
        >>> card = render_card(CardFacts("user/model", "DDIMPipeline", {"unet": 1234}))
        >>> card.data.pipeline_tag
        'unconditional-image-generation'
    """
    if facts.results is not None:
        arms = ", ".join(facts.results["arms"])
        require(facts.arm in facts.results["arms"], "arm", f"be one of {arms}", facts.arm)
    sections = [
        f"# {_title(facts)}",
        KINDS[facts.class_name].summary.format_map(facts.config),
        f"![Samples]({facts.picture})" if facts.picture else "",
        f"## Use\n\n{_use(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Evaluation\n\n{_evaluation(facts)}",
        f"## Limits and bias\n\n{_limits(facts)}",
        "## Licence\n\nApache-2.0, weights and code. The training data has its own terms.",
        f"## Citation\n\n{_citation(facts)}",
    ]
    text = "\n\n".join(section for section in [*sections, MARK] if section)
    return ModelCard(f"---\n{metadata(facts).to_yaml()}\n---\n\n{text}\n")


def render_part_card(repo_id: str, class_name: str) -> ModelCard:
    """The card of a single part of a pipeline."""
    data = ModelCardData(license=LICENSE, library_name="diffusers", tags=["diffusers", HOME])
    snippet = f'from ot_diffusers import {class_name}\n\npart = {class_name}.from_pretrained("{repo_id}")'
    text = f"# {repo_id.split('/')[-1]}\n\nA `{class_name}` of `pip install {HOME}`.\n\n```python\n{snippet}\n```"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n{MARK}\n")


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's metadata, with the results of the arm as a model index."""
    results = _eval_results(facts)
    return ModelCardData(
        license=LICENSE,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["diffusers", "diffusion", HOME, *KINDS[facts.class_name].tags],
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=[result.metric_type for result in results] or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    if facts.results is None or facts.arm is None:
        return []
    entry = facts.results["arms"][facts.arm]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=facts.dataset or "local",
            dataset_name=_data_title(facts),
            dataset_split="test",
            metric_type=name,
            metric_name=METRICS[name].label if name in METRICS else name,
            metric_value=entry["metrics"][name],
            metric_args=_metric_arguments(facts.results, entry, name),
        )
        for name in facts.results.get("headline", HEADLINE)
        if name in entry["metrics"]
    ]


def _metric_arguments(results: Mapping[str, Any], entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """How the value was measured: number of images, network, seeds and interval, and what real images score."""
    interval = entry.get("intervals", {}).get(metric)
    arguments = {
        "num_samples": results["num_samples"],
        "extractor": results["second_extractor" if metric in SECOND else "extractor"]["name"],
        "seeds": len(results.get("seeds", [0])),
        "interval_95": [interval["low"], interval["high"]] if interval else None,
        "real_images": results.get("floor", {}).get("metrics", {}).get(metric),
    }
    return {name: value for name, value in arguments.items() if value is not None}


# --- Sections ---------------------------------------------------------------------------------------------------------


def _title(facts: CardFacts) -> str:
    return facts.repo_id.split("/")[-1]


def _use(facts: CardFacts) -> str:
    name, call = facts.class_name, KINDS[facts.class_name].call
    module = "ot_diffusers" if name in NOTES else "diffusers"
    snippet = (
        f"```python\n"
        f"from {module} import {name}\n\n"
        f'pipe = {name}.from_pretrained("{facts.repo_id}")\n'
        f"images = pipe({call}).images\n"
        f'images[0].save("sample.png")\n```'
    )
    package = HOME if name in NOTES else "diffusers"
    return f"{snippet}\n\n`pip install {package}`. {NOTES.get(name, '')}".rstrip()


def _training(facts: CardFacts) -> str:
    lines = [f"Data: {_data_title(facts)}."]
    lines += [_procedure(part, run, results) for part, (run, results) in facts.runs.items()]
    if facts.weights_dtype != "float32":
        lines.append(f"The weights are stored in {facts.weights_dtype}, rounded after training and evaluation.")
    sizes = ", ".join(f"{name} {number:,}" for name, number in facts.parameters.items())
    return "\n\n".join([" ".join(lines), f"Parameters: {sizes}. The configuration of each run is in `training/`."])


def _data_title(facts: CardFacts) -> str:
    """What the training data is called; a local data set keeps its name to itself."""
    if facts.dataset is None:
        return "a local data set" if facts.runs or facts.results else "not recorded"
    return DATA[facts.dataset].title if facts.dataset in DATA else facts.dataset


def _procedure(part: str, run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """One sentence for a run of a training script."""
    config, images = run["config"], run.get("data", {}).get("num_samples")
    script = run["script"].split("/")[-1]
    seconds = format_number(results.get("training_seconds"))
    seen = f" on {images:,} images" if images else ""
    return (
        f"The {part} by `{script}`{seen}: {results.get('updates', 0):,} updates of {config['train_batch_size']} "
        f"images, AdamW with learning rate {config['learning_rate']:g} ({config['lr_scheduler']}), "
        f"seed {config['seed']}, {seconds} s."
    )


def _evaluation(facts: CardFacts) -> str:
    if facts.results is None:
        return "None yet; `ot-diffusers evaluate` makes one."
    results = facts.results
    seeds = len(results.get("seeds", [0]))
    drawn = f"means over {seeds} seeds, ± half of the 95% interval" if seeds > 1 else "one seed"
    return (
        f"This model is the row **{facts.arm}**: {results['num_samples']:,} images against the test images, {drawn}, "
        f"in features of {results['extractor']['name']}, which neither training nor sampling saw. *Real vs real* is "
        f"what as many training images score, the floor. All numbers are in `results.json`.\n\n{quote(results)}"
    )


def _limits(facts: CardFacts) -> str:
    data_set = DATA.get(facts.dataset or "")
    lines = [data_set.limits] if data_set else []
    if facts.class_name == "OTGuidedDDIMPipeline":
        lines.append(
            "Guidance pulls a batch towards the stored references, and so towards their imbalances; images depend on "
            "their batch."
        )
    lines.append("For research and teaching. Samples may resemble training images.")
    return " ".join(lines)


def _citation(facts: CardFacts) -> str:
    entries = []
    for key in KINDS[facts.class_name].papers:
        authors, title, venue, year, arxiv = PAPERS[key].split("|")
        entries.append(
            f"@inproceedings{{{key},\n  author = {{{authors}}},\n  title = {{{title}}},\n  booktitle = {{{venue}}},\n"
            f"  year = {{{year}}},\n  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
        )
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
