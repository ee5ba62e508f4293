"""Exact rewrites of the training-form network, and the runner that proves each of them.

`runner.PASSES` lists them in running order. A pass changes a `MobileVDUNet` in place and says which modules
it changed; it never judges itself. `run_passes` compares the network's one-step map after each pass
with the outputs captured before the first.
"""
