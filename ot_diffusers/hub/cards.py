"""Model cards: what a pipeline is, how it was trained and evaluated, written from the files of its run.

Every number comes from `run.json` and `results.json`. Metadata and results are written by huggingface_hub's `ModelCard`
and `EvalResult`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import HUB_IDS
from ..errors import require
from ..evaluation.health import evaluator_doubt
from ..evaluation.metric_table import HEADLINE, METRICS, SECOND
from ..pipelines.classes import LISTED
from ..reporting.differences import interval_rows, verdict
from ..reporting.quoting import quote
from ..reporting.report import format_number, markdown_rows

LICENSE = "apache-2.0"
TASK = "unconditional-image-generation"
HOME = "ot-diffusers"
MARK = "<!-- Written by ot-diffusers. The next push replaces this card, unless this line is removed. -->"


@dataclass(frozen=True)
class DataFacts:
    """What a card says about a data set.

    Attributes:
        title: its full name.
        fingerprint: fingerprint of its training images, as `load_images` returns them.
        limits: what a model trained on it cannot know.
    """

    title: str
    fingerprint: str
    limits: str


DATA = {
    HUB_IDS["digits"]: DataFacts(
        "Optical recognition of handwritten digits (UCI; scikit-learn's copy)",
        "9dfd7047b8126583a393ea6f2acd685966ed6c4994285df3768524744f34e48c",
        "The data are 1,797 grey images of 8×8 pixels, written by 13 people. They are enough to show the method and "
        "too few to represent handwriting.",
    ),
    HUB_IDS["mnist"]: DataFacts(
        "MNIST",
        "4dd0ad946d6165ddb02fdfac60e262d3dfad24c121cfbf76c1c4c8fb896c73da",
        "The digits were written by American census workers and high-school students, then centred and cleaned. Other "
        "ways of writing digits, and other scripts, are missing.",
    ),
    HUB_IDS["cifar10"]: DataFacts(
        "CIFAR-10",
        "df6ca9fc01c95abc99fccef525fd44efc655d75b3f2fe98b0a90be4074d875d5",
        "The data are photographs of ten classes, collected from the web in the 2000s and reduced to 32×32 pixels. "
        "What is over- or under-represented in them is so in the samples.",
    ),
}
"""Facts of each data set by its Hub id."""


@dataclass(frozen=True)
class Kind:
    """What a card says about a pipeline class."""

    summary: str
    tags: tuple[str, ...]
    steps: int | None
    papers: tuple[str, ...]


GUIDANCE = (
    "With optimal-transport guidance, the predicted clean images of a batch are moved together at every guided step, "
    "so that the Sinkhorn divergence between their features and stored features of real images becomes smaller."
)

KINDS = {
    "OTGuidedDDIMPipeline": Kind(
        "An unconditional DDIM pipeline.",
        ("optimal-transport", "ddim"),
        50,
        ("song2021denoising", "feydy2019interpolating"),
    ),
    "TruncatedPriorPipeline": Kind(
        "A truncated diffusion pipeline. A prior generates the noisy images of step T' = {truncation_timestep} in one "
        "network call, and the denoiser takes only the steps that are left.",
        ("optimal-transport", "truncated-diffusion"),
        None,
        ("zheng2022truncated", "lyu2022accelerating", "feydy2019interpolating"),
    ),
    "FlowMatchPipeline": Kind(
        "An unconditional flow-matching pipeline.",
        ("flow-matching",),
        50,
        ("lipman2023flow",),
    ),
    "DDIMPipeline": Kind("An unconditional DDIM pipeline.", ("ddim",), 50, ("song2021denoising",)),
    "DDPMPipeline": Kind("An unconditional DDPM pipeline.", ("ddpm",), None, ("ho2020denoising",)),
}

OWN = ("OTGuidedDDIMPipeline", "FlowMatchPipeline", "TruncatedPriorPipeline")
"""Pipeline classes of this package; the others are those of diffusers."""

NOTES = {
    "OTGuidedDDIMPipeline": "Without this package, the repository loads as a plain `diffusers.DDIMPipeline`.",
    "FlowMatchPipeline": "diffusers itself has no unconditional pipeline for flow matching.",
    "TruncatedPriorPipeline": "Each image takes one call of the prior, and one call of the denoiser for each step.",
}
"""What a user of this package's pipelines has to know."""

TRAINED = {"train_prior.py": "prior", "train_features.py": "feature network"}
"""Training script to what it trains, where that is not the denoiser."""

BETTER = {"lower": "lower is better", "higher": "higher is better", "floor": "closer to real images is better"}

PAPERS = {
    "ho2020denoising": "J. Ho and A. Jain and P. Abbeel|"
    "Denoising Diffusion Probabilistic Models|NeurIPS|2020|2006.11239",
    "song2021denoising": "J. Song and C. Meng and S. Ermon|Denoising Diffusion Implicit Models|ICLR|2021|2010.02502",
    "lipman2023flow": "Y. Lipman and R. T. Q. Chen and H. Ben-Hamu and M. Nickel and M. Le|"
    "Flow Matching for Generative Modeling|ICLR|2023|2210.02747",
    "feydy2019interpolating": "J. Feydy and T. Séjourné and F.-X. Vialard and S. Amari and A. Trouvé and G. Peyré|"
    "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences|AISTATS|2019|1810.08278",
    "zheng2022truncated": "H. Zheng and P. He and W. Chen and M. Zhou|"
    "Truncated Diffusion Probabilistic Models and Diffusion-based Adversarial Auto-Encoders|ICLR|2023|2202.09671",
    "lyu2022accelerating": "Z. Lyu and X. Xu and C. Yang and D. Lin and B. Dai|"
    "Accelerating Diffusion Models via Early Stop of the Diffusion Process|arXiv preprint|2022|2205.12524",
}
"""BibTeX key to authors, title, venue, year and arXiv number; the whole list is in `REFERENCES.md`."""


Records = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Name of a training run to its `run.json` and `results.json`."""


@dataclass(frozen=True)
class Picture:
    """A grid of samples that stands beside the card.

    Attributes:
        file: name of the PNG file.
        plain_file: name of the same grid without guidance, or None.
        image_size: height and width of one sample in pixels.
        num_images: number of samples, which were generated as one batch.
        nfe: network calls for each image.
        classes: names of the classes in the rows of the grid; none without classes.
    """

    file: str
    plain_file: str | None
    image_size: tuple[int, int]
    num_images: int
    nfe: int
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class CardFacts:
    """All that a card is written from.

    Attributes:
        repo_id: Hub id that the snippet loads from.
        class_name: class of the pipeline.
        parameters: number of parameters of each part.
        dataset: Hub id of the training data; None where it is not known to come from the Hub.
        config: configuration of the scheduler, with `truncation_timestep` for a truncated chain.
        runs: what the training runs recorded.
        results: contents of an evaluation's `results.json`, or None.
        arm: the method in `results` that is this pipeline.
        beside: methods in `results` that the card shows beside it; the first one by default.
        hardware: what the times in `runs` and `results` were measured on, such as "two CPU cores".
        picture: a grid of samples, or None.
        num_inference_steps: denoising steps of the snippet and the picture; None is the pipeline's default.
        weights_dtype: dtype of the stored weights.
    """

    repo_id: str
    class_name: str
    parameters: Mapping[str, int]
    dataset: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    runs: Records = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    arm: str | None = None
    beside: Sequence[str] = ()
    hardware: str | None = None
    picture: Picture | None = None
    num_inference_steps: int | None = None
    weights_dtype: str = "float32"

    @property
    def of_classes(self) -> bool:
        """Whether images can be asked for by their class."""
        return bool(self.config.get("class_names"))

    @property
    def guided(self) -> bool:
        """Whether the pipeline has the parts of OT guidance."""
        return "reference_bank" in self.parameters


def render_card(facts: CardFacts) -> ModelCard:
    """The card, metadata and text.

    Raises:
        InputError: a method that the results do not have.

    Example:
        >>> card = render_card(CardFacts("user/model", "DDIMPipeline", {"unet": 1234}))
        >>> card.data.pipeline_tag
        'unconditional-image-generation'
    """
    if facts.results is not None:
        arms = facts.results["arms"]
        for name, arm in [("arm", facts.arm), *(("beside", arm) for arm in facts.beside)]:
            require(arm in arms, name, f"be one of {', '.join(arms)}", arm)
    sections = [
        f"# {_title(facts)}",
        _summary(facts),
        _picture(facts),
        f"## Use\n\n{_use(facts)}",
        f"## Results\n\n{_results(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Intended use and limits\n\n{_limits(facts)}",
        "## Licence\n\nWeights and code are under Apache-2.0. The training data has its own terms.",
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
    """The card's metadata, with the results of this model as a model index."""
    results = _eval_results(facts)
    return ModelCardData(
        license=LICENSE,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["diffusers", "diffusion", HOME, *KINDS[facts.class_name].tags, *facts.of_classes * ["class-conditional"]],
        base_model=next(filter(None, map(base_model, facts.runs.values())), None),
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=[result.metric_type for result in results] or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def base_model(records: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str | None:
    """Hub id of the pipeline that a run started from; None for a local one, or none."""
    return (records[0].get("pretrained") or {}).get("hub_id")


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
    """How the value was measured: number of images, network, random seeds and interval, and the real-vs-real score."""
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


def _listed(names: Sequence[str]) -> str:
    """The first names of classes."""
    return ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")


def _title(facts: CardFacts) -> str:
    return facts.repo_id.split("/")[-1]


def _summary(facts: CardFacts) -> str:
    summary = KINDS[facts.class_name].summary.format_map(facts.config)
    if facts.of_classes:
        summary = summary.replace("An unconditional", "A class-conditional")
        summary += f" Its classes, by name for `class_labels`: {_listed(facts.config['class_names'])}."
    return f"{summary} {GUIDANCE}" if facts.guided else summary


def _picture(facts: CardFacts) -> str:
    """The grid of samples, beside the one without guidance where there is one, and a caption."""
    picture = facts.picture
    if picture is None:
        return ""
    height, width = picture.image_size
    calls = f"Each image takes {picture.nfe} network call{'s' * (picture.nfe != 1)} (NFE)"
    size = f"The images have {width}×{height} pixels and are enlarged with smooth interpolation."
    if picture.classes:
        size = f"There is a row for each class: {', '.join(picture.classes)}. {size}"
    if picture.plain_file is None:
        return f"![Samples]({picture.file})\n\n*{picture.num_images} samples of this model. {calls}. {size}*"
    return (
        "| without guidance | with guidance |\n| :---: | :---: |\n"
        f"| ![Samples without guidance]({picture.plain_file}) | ![Samples with guidance]({picture.file}) |\n\n"
        f"*Both panels show {picture.num_images} images from the same noise; the right one is guided as one batch. "
        f"{calls}; guidance adds calls of the feature network. {size}*"
    )


def _use(facts: CardFacts) -> str:
    name, tuned = facts.class_name, facts.config.get("tuned_steps")
    steps = facts.num_inference_steps or tuned or KINDS[name].steps
    package = HOME if name in OWN else "diffusers"
    call = "batch_size=64"
    if facts.of_classes:
        call += f', class_labels="{facts.config["class_names"][0]}"'
    if steps:
        call += f", num_inference_steps={steps}"
    snippet = (
        f"```python\n"
        f"from {package.replace('-', '_')} import {name}\n\n"
        f"# A Hub id, or the path of this folder.\n"
        f'pipe = {name}.from_pretrained("{facts.repo_id}")\n'
        f"images = pipe({call}).images\n"
        f'images[0].save("sample.png")\n```'
    )
    notes = [f"Install the package by `pip install {package}`."]
    if facts.of_classes:
        notes.append(
            "`class_labels` takes names or numbers of classes, one for all images or one for each; without it, they "
            "are drawn by their frequencies in the training data."
        )
    if facts.config.get("noise_coupling") not in (None, "independent"):
        notes.append(
            "Noise and images were paired by optimal transport in training. A few steps are enough, and the sampler "
            "must be deterministic and begin with pure noise."
        )
    if tuned:
        notes.append(f"The denoiser is tuned for {tuned} step{'s' * (tuned > 1)}; it is not meant for more.")
    if facts.guided:
        compared = "the images of each class" if facts.config.get("guides_by_class") else "the whole batch"
        of_class = " of a class" if facts.config.get("guides_by_class") else ""
        notes.append(
            f"Guidance compares {compared} with real images: generate 64 images or more{of_class} at once. "
            "`guidance_scale=0` turns guidance off."
        )
    # DDIMPipeline has neither labels nor a decoder of latents.
    opens_elsewhere = name != "OTGuidedDDIMPipeline" or not (facts.of_classes or "vae" in facts.parameters)
    return f"{snippet}\n\n{' '.join([*notes, NOTES.get(name, '') if opens_elsewhere else ''])}".rstrip()


def _training(facts: CardFacts) -> str:
    lines = [f"- Data: {_data_title(facts)}."]
    lines += [_procedure(run, results) for run, results in facts.runs.values()]
    sizes = ", ".join(f"{name} {number:,}" for name, number in facts.parameters.items())
    lines.append(f"- Numbers of parameters: {sizes}.")
    if facts.weights_dtype != "float32":
        lines.append(f"- The weights are stored in {facts.weights_dtype}: they were rounded after the evaluation.")
    where = [f"`training/` holds the configuration and the log of each run. {_measured(facts)}"] if facts.runs else []
    return "\n\n".join(["\n".join(lines), *where]).rstrip()


def _measured(facts: CardFacts) -> str:
    return f"Times were measured on {facts.hardware}." if facts.hardware else ""


def _data_title(facts: CardFacts) -> str:
    """Title of the training data; the name of a local data set is not published."""
    if facts.dataset is None:
        return "a local data set" if facts.runs or facts.results else "not recorded"
    return DATA[facts.dataset].title if facts.dataset in DATA else facts.dataset


def _procedure(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """One list entry for a run of a training script."""
    config, images = run["config"], run.get("data", {}).get("num_samples")
    script = run["script"].split("/")[-1]
    seconds = format_number(results.get("training_seconds"))
    seen = f" on {images:,} images" if images else ""
    source = base_model((run, results))
    named = f"[{source}](https://huggingface.co/{source})" if source else "a local pipeline"
    start = f" It started from {named}." if run.get("pretrained") else ""
    return (
        f"- The {TRAINED.get(script, 'denoiser')} was trained by `{script}`{seen}: {results.get('updates', 0):,} "
        f"training steps of {config['train_batch_size']} images, AdamW with a learning rate of "
        f"{config['learning_rate']:g} ({config['lr_scheduler']} schedule), random seed {config['seed']}, {seconds} s."
        f"{start}"
    )


def _results(facts: CardFacts) -> str:
    """This model beside others, the verdicts, and the table of all methods."""
    results = facts.results
    if results is None:
        return "This model has not been evaluated; `ot-diffusers evaluate` does it."
    seeds = len(results.get("seeds", [0]))
    spread = (
        f"Values are means over {seeds} random seeds ± half of the 95% confidence interval."
        if seeds > 1
        else "One random seed was run, so there are no intervals and no verdicts."
    )
    first = (
        f"{results['num_samples']:,} samples{_batches(facts)} were compared with the test images in the features of "
        f"{results['extractor']['name']}, which was used neither in training nor in guidance. {spread} The column "
        f"*real vs real* is the score of as many real training images. {_measured(facts)}".rstrip()
    )
    every = [quote({key: value for key, value in results.items() if key != "summary"})]
    described = {arm: entry.get("description") for arm, entry in results["arms"].items()}
    every.append("\n".join(f"- **{arm}**: {description}" for arm, description in described.items() if description))
    meanings = [f"- **{METRICS[name].label}**: {METRICS[name].meaning}" for name in _metrics(facts)]
    every.append("\n".join([*meanings, "- **NFE**: Number of network calls for each image."]))
    every.append("All numbers are in `results.json`.")
    details = "<details>\n<summary>All methods of the evaluation, and what the metrics mean</summary>"
    every = [details, *filter(None, every), "</details>"]
    return "\n\n".join(filter(None, [first, _verdicts(facts), markdown_rows(_beside(facts)), *every]))


def _batches(facts: CardFacts) -> str:
    """Size of the batches that were guided in the evaluation, where it was recorded."""
    assert facts.results is not None
    provenance = facts.results.get("provenance", {})
    settings = provenance.get("study") or provenance.get("comparison") or {"arms": {}}
    variant = settings["arms"].get(facts.arm)
    if not facts.guided or variant is None:
        return ""
    return f", guided in batches of {variant['batch_size'] or facts.results['num_samples']:,},"


def _metrics(facts: CardFacts) -> list[str]:
    """The headline metrics that this model has."""
    assert facts.results is not None
    measured = facts.results["arms"][facts.arm]["metrics"]
    return [name for name in facts.results.get("headline", HEADLINE) if name in measured and name in METRICS]


def _beside(facts: CardFacts) -> list[list[str]]:
    """Metrics by methods: this model, those it is shown beside, real images; the costs last."""
    assert facts.results is not None
    results = {"floor": {"metrics": {}}, **facts.results}
    arms = results["arms"]
    shown = [str(facts.arm), *(arm for arm in facts.beside or list(arms)[:1] if arm != facts.arm)]
    metrics = _metrics(facts)
    cells = {row[0]: row[1:] for row in interval_rows(results, metrics)[1:]}
    rows = [["", f"{shown[0]} (this model)", *shown[1:], "real vs real"]]
    for index, name in enumerate(metrics):
        label = f"{METRICS[name].label} ({BETTER[METRICS[name].better]})"
        rows.append([label, *(cells[arm][index] for arm in [*shown, "real vs real"])])
    for key, label in {"nfe": "NFE", "seconds_per_1000": "seconds per 1,000 images"}.items():
        if key in arms[facts.arm]:
            rows.append([label, *(format_number(arms[arm].get(key)) for arm in shown), "–"])
    return rows


def _verdicts(facts: CardFacts) -> str:
    """What the paired differences show, in one sentence; "" where none were computed."""
    assert facts.results is not None
    by_metric = facts.results.get("differences", {}).get(facts.arm)
    if not by_metric:
        return ""
    doubt = evaluator_doubt(facts.results["extractor"])
    if doubt is not None:
        return f"There is no verdict, because the evaluator cannot be trusted: {doubt}."
    first, seeds = next(iter(facts.results["arms"])), len(facts.results["seeds"])
    groups: dict[str, list[str]] = {}
    for name, difference in by_metric.items():
        groups.setdefault(verdict(name, difference), []).append(METRICS[name].label if name in METRICS else name)
    said = "; ".join(f"{word} in {', '.join(labels)}" for word, labels in groups.items())
    return f"Verdicts against **{first}**, paired over {seeds} random seeds: {said}."


def _limits(facts: CardFacts) -> str:
    lines = [
        "This model is meant for research and teaching. It is not meant as a source of realistic images, or of "
        "training data for models that decide about people. Samples may resemble training images."
    ]
    results = facts.results or {}
    entries = results.get("arms", {}).get(facts.arm, {}), results.get("floor", {})
    samples, real = (entry.get("metrics", {}).get("frechet_distance") for entry in entries)
    if samples and real:
        ratio = format_number(samples / real)
        lines.append(f"The Fréchet distance of the samples is {ratio} times the real-vs-real score.")
    data_set = DATA.get(facts.dataset or "")
    lines += [data_set.limits] if data_set else []
    if facts.guided:
        lines.append(
            "Guidance moves the samples towards the stored real images, and so towards their imbalances. A guided "
            "image depends on the other images of its batch."
        )
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
