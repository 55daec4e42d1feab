"""Where a model's forks are: every response token with its entropy, and what can be said about them.

Read ``table.py`` first: the folder of parquet files that everything else writes or reads. ``run.py`` fills one:
``sources.py`` and ``sampling.py`` bring the texts, ``measure.py`` their entropies, ``select.py`` marks the top ρ.
``summary.py`` (with ``parts_of_text.py``) and ``compare.py`` read it, ``plots.py`` and ``report_files.py`` show it.
"""
