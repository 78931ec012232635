"""The trainer: data, views, encoders, projectors, optimisers, checkpoints, loop and probe."""
