"""The artifact: manifest, reader, builder, comparison, packing. Imports no torch."""
