"""What a user chooses: model specs, presets, recipes and devices. Imports no torch."""
