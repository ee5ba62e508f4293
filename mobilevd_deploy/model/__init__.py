"""The networks in training form, their interface, and the checkpoints that hold their weights."""
