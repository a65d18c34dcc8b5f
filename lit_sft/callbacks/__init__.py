"""What happens around the training loop: one file per concern, none of which knows another."""

from lit_sft.callbacks.answers import Answers, FirstExample
from lit_sft.callbacks.evaluation import Evaluation
from lit_sft.callbacks.hf_export import HFExport
from lit_sft.callbacks.predictions import PredictionWriter
from lit_sft.callbacks.throughput import Throughput

__all__ = ["Answers", "Evaluation", "FirstExample", "HFExport", "PredictionWriter", "Throughput"]
