"""Clips and pictures that are drawn, with known truth: training data of the demo, calibration, tests."""
