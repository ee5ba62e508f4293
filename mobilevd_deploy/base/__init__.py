"""What every other package may use and what depends on nothing of ours: files, processes, tensors, progress."""
