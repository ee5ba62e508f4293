"""What every other package may use: files, processes, tensors, progress, charts.."""
