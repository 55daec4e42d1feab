"""What a reader runs and copies. Each script runs from the repository's folder: ``python -m examples.NAME``."""
