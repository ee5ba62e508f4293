"""Basic tools that every other package may import: files, processes, tensors, progress, charts."""
