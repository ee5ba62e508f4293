"""Exact rewrites of the network in training form, and the runner that proves each of them.

`runner.PASSES` lists the passes in running order. A pass changes a `MobileVDUNet` in place and returns the
paths of the changed modules. It does not check itself: after each pass, `run_passes` compares the network's
outputs with those captured before the first pass.
"""
