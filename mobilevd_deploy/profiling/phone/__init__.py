"""Profiling on a phone that is attached over adb. Start at run.py."""
