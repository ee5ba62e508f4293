"""The deploy form: what is exported. Plain modules, fixed shapes, tensors of rank <= 4, one step.

Feature maps are (T, C, H, W) with the frames as batch. Weights are shared with the network that a
module is built from wherever their shape allows it.
"""
