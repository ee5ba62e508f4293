"""Drawn clips and pictures with known ground truth: for the demo's training, calibration and tests."""
