"""The loop, and what keeps it honest: length, learning rate, checkpoints, export, samples."""
