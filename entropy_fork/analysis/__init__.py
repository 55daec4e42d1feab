"""Where a model's forks are: every response token with its entropy, and what can be said about them.

Read ``table.py`` first: the folder of parquet files that everything else writes or reads.
"""
