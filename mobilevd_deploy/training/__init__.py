"""Initial checkpoints, and training of the demo: temporal block pruning, optimiser, stages, quality."""
