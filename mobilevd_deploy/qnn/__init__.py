"""Compilation for the Hexagon NPU: lint, compiler, the compiled graph read back, simulator."""
