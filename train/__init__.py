"""The engine, the two stages, the loop, checkpoints, metrics and evaluation."""
