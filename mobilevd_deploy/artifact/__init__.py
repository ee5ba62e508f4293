"""The artifact: its manifest, the reader, the folder in which it is built, comparison and packing. No torch."""
