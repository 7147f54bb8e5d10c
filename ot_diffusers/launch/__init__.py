"""Start the training scripts: as commands, in several processes, and with signals that ask them to stop."""

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
