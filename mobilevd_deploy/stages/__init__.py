"""What each stage of an export does, and the records of finished stages. The order is in deploy.py."""
