"""Quantisation with AIMET: simulation, the graph that it writes, its checks and judges, calibration."""
