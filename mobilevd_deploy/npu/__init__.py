"""The deploy form, which is exported: plain modules, fixed shapes, tensors of rank <= 4, one denoising step.

Feature maps are (T, C, H, W) with the frames as batch. Modules share the weights of the network that they are
built from, except where a weight is folded or changes its shape.
"""
