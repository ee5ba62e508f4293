"""Artifacts: manifest, reader, builder, comparison and packing. Imports no torch."""
