"""Readers for what the papers' authors released. Nothing here writes to, or ships, the released files.

`scan(folder)` finds and reads everything below a folder; the single readers are for single files.
"""

from em_interp.published.activations import (
    DIFFERENCES,
    ActivationCell,
    ActivationSplit,
    model_of,
    read_activation_cell,
    read_activation_folder,
)
from em_interp.published.judged import read_judged_csv
from em_interp.published.questions import JudgePrompt, read_judges
from em_interp.published.runs import LoraCheckpoint, Run, TrainingLog, read_lora_checkpoint, read_run, solution_at
from em_interp.published.scan import JudgedSet, PublishedData, StoredPCA, scan

__all__ = [
    "DIFFERENCES",
    "ActivationCell",
    "ActivationSplit",
    "JudgePrompt",
    "JudgedSet",
    "LoraCheckpoint",
    "PublishedData",
    "Run",
    "StoredPCA",
    "TrainingLog",
    "model_of",
    "read_activation_cell",
    "read_activation_folder",
    "read_judged_csv",
    "read_judges",
    "read_lora_checkpoint",
    "read_run",
    "scan",
    "solution_at",
]
