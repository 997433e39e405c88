"""Training: objectives, the loop, checkpoints, run folders."""
