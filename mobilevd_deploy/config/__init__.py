"""What a user writes or chooses: specs, presets, recipes, devices. Imports no torch."""
