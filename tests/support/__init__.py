"""Stand-ins and tools of the tests; nothing here is a test.

adb_phone         the `adb` program with one phone attached
clip_reference    clips that Python made, for the app's tests
golden            the files in tests/vectors, which Python and Java read alike
html_page         an HTML page taken apart
hub_server        Qualcomm AI Hub on this computer, faults included
networks          small random networks and checkpoints
schema_mutations  documents that are wrong in one place, held against a JSON Schema
tiny_artifact     an artifact of four small ONNX graphs
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
