"""Training of the demo checkpoint: procedural clips, temporal block pruning, and the staged run."""
