"""Takes a trained MobileVD checkpoint to a Snapdragon phone."""

__version__ = "0.1.0"
