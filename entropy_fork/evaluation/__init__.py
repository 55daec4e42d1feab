"""A checkpoint on benchmarks: sampling, scoring, statistics, and the paper's table beside them.

Read ``run.py`` first. ``statistics.py`` is the mathematics (numpy only); ``questions.py`` reads verl's parquet,
``checkpoint.py`` finds or makes the Hugging Face folder of a model, ``engines.py`` samples, ``answers.py`` keeps every
answer so that a second call goes on where the first stopped, ``report.py`` writes the tables.
"""
