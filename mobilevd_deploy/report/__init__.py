"""HTML pages: the report of an export, and the profiles of an artifact."""
