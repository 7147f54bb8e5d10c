"""How the training scripts are started: as commands, in several processes, and under signals that ask them to stop."""

from .commands import SCRIPTS, launched, preset_path, presets_of, run_command, script_path, training_command
from .script import run_script

__all__ = [
    "SCRIPTS",
    "launched",
    "preset_path",
    "presets_of",
    "run_command",
    "run_script",
    "script_path",
    "training_command",
]
