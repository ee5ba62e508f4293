"""Profiling on phones that AI Hub hosts. Start at run.py."""
