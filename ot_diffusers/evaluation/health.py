"""Whether an evaluator can be trusted. A comparison of models is only as good as the features that it uses.

Both bounds come from small classifiers, from untrained to trained, and from their scores of uniform noise:

    at 3 classes of CIFAR-10    80% accuracy, effective rank 2.2 … 3.5: Precision of noise .89 … .97
    at 10 classes of CIFAR-10   47% accuracy, effective rank 5.5: Precision of noise 1.00
    digits and MNIST            97% accuracy, effective rank 6.0 … 9.7: used in this package's studies
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

MIN_EFFECTIVE_RANK = 5.0
"""Below this rank, clearly different images have almost the same features."""

MIN_SKILL = 0.5
"""Lower bound of (accuracy − chance) / (1 − chance), where chance is the share of the commonest class."""


def evaluator_doubt(facts: Mapping[str, Any]) -> str | None:
    """Why an evaluator cannot be trusted and what to do about it, in one sentence; None if it can be trusted.

    Args:
        facts: see `evaluator_facts`; facts that older results do not contain are not required.

    Example:
        >>> evaluator_doubt({"effective_rank": 6.2, "has_classifier": True, "test_accuracy": 0.978, "chance": 0.1})
        >>> evaluator_doubt({"effective_rank": 1.19, "has_classifier": True, "test_accuracy": 0.6, "chance": 0.34})
        'its features of real images have an effective rank of 1.2, below 5; train it longer, or use a general backbone'
    """
    rank, accuracy = facts.get("effective_rank"), facts.get("test_accuracy")
    if rank is not None and rank < MIN_EFFECTIVE_RANK:
        problem = f"its features of real images have an effective rank of {rank:.1f}, below {MIN_EFFECTIVE_RANK:.0f}"
    elif accuracy is not None and accuracy - facts.get("chance", 0) < MIN_SKILL * (1 - facts.get("chance", 0)):
        problem = f"its test accuracy is {accuracy:.1%}, and {facts.get('chance', 0):.1%} is chance"
    elif accuracy is None and facts.get("has_classifier"):
        return "its test accuracy is unknown, because the test images have no labels that it knows"
    else:
        return None
    return f"{problem}; train it longer, or use a general backbone"


def warn_of_doubt(facts: Mapping[str, Any]) -> None:
    """Warn of an evaluator that cannot be trusted; once for each reason."""
    doubt = evaluator_doubt(facts)
    if doubt is not None:
        warnings.warn(f"The evaluator cannot be trusted: {doubt}.", stacklevel=1)


def evaluator_line(facts: Mapping[str, Any], opening: str = "Evaluated by") -> str:
    """A sentence about the evaluator for the caption of a table, with the doubt, if any; "" for no evaluator.

    Example:
        >>> evaluator_line({"name": "dinov2", "feature_dim": 384, "effective_rank": 91.5, "has_classifier": False})
        'Evaluated by dinov2: 384 features, effective rank 91.5 on real images, no classifier.'
    """
    if "name" not in facts:
        return ""
    properties = ", ".join(evaluator_properties(facts))
    doubt = evaluator_doubt(facts)
    line = f"{opening} {facts['name']}{': ' if properties else ''}{properties}."
    return line if doubt is None else f"{line} No verdict should rest on it: {doubt}."


def evaluator_properties(facts: Mapping[str, Any]) -> list[str]:
    """Dimension, effective rank and test accuracy in words, as far as they are known."""
    accuracy, rank = facts.get("test_accuracy"), facts.get("effective_rank")
    said = [f"{facts['feature_dim']} features"] if "feature_dim" in facts else []
    said += [f"effective rank {rank:.1f} on real images"] if rank is not None else []
    if accuracy is not None:
        said.append(f"{accuracy:.1%} test accuracy")
    elif "has_classifier" in facts:
        said.append("test accuracy unknown" if facts["has_classifier"] else "no classifier")
    return said
