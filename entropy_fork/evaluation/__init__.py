"""A checkpoint on benchmarks: its answers, their scores and statistics, and the paper's table beside them.

Read ``evaluate.py`` first, then ``statistics.py``, the mathematics (numpy only). ``questions.py`` reads verl's parquet,
``checkpoint.py`` finds or makes the Hugging Face folder of a model, ``engines.py`` generates answers,
``answer_store.py`` keeps every answer so that a second call continues where the first one stopped, ``results.py``
writes the tables. ``tokenizer.py`` loads the tokenizer. ``temperature_sweep.py`` runs the evaluation at several pairs
of temperatures.

Two evaluations: ``compare.py`` pairs them by question, ``paired.py`` is the mathematics (numpy only), and
``compare_results.py`` writes tables and the figure.
"""
