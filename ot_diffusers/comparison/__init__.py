"""Does one way to make images beat another? Arms over paired seeds, intervals of their differences, and their cost.

    ot-diffusers compare runs/baseline runs/ot --dataset digits --evaluator runs/evaluator --seeds 5
    ot-diffusers compare --config configs/digits/compare.yaml

For every seed, the arms that train see the same initial weights and the same order of the data, all arms are sampled
from the same starting noise, and one evaluator that no loss has seen scores them with the same random subsets. What is
compared is then the difference to the first arm, or to `compare_with`, seed by seed. Real images in place of generated
ones give the floor. Everything finished is kept: the same command goes on where it stopped, and more seeds join those
that are there.
"""

from .config import Arm, ComparisonConfig, choose_arms, read_config
from .results import tables
from .run import run_comparison

__all__ = ["Arm", "ComparisonConfig", "choose_arms", "read_config", "run_comparison", "tables"]
