"""The parts of an optimizer step beside the model: optimizer, random states, metrics, FLOPs."""
