"""What happens around the training loop: one file per concern, none of which knows another."""

from lit_sft.callbacks.answers import Answers, FirstExample
from lit_sft.callbacks.averaging import Averaging
from lit_sft.callbacks.evaluation import Evaluation
from lit_sft.callbacks.failing import FailTogether
from lit_sft.callbacks.guard import FaultOptions, Guard
from lit_sft.callbacks.hf_export import HFExport
from lit_sft.callbacks.logs import KeepFolder, LeaveFolder
from lit_sft.callbacks.predictions import PredictionWriter
from lit_sft.callbacks.progress import Lines, Progress, has_stopped_early
from lit_sft.callbacks.throughput import Throughput

__all__ = [
    "Answers",
    "Averaging",
    "Evaluation",
    "FailTogether",
    "FaultOptions",
    "FirstExample",
    "Guard",
    "HFExport",
    "KeepFolder",
    "LeaveFolder",
    "Lines",
    "PredictionWriter",
    "Progress",
    "Throughput",
    "has_stopped_early",
]
