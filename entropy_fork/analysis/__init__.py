"""Where a model's forks are: the entropy of every response token, and statistics of these entropies.

Read ``tokens/store.py`` first: everything here writes or reads such a folder of tokens. ``analyze.py`` fills one:
``texts.py`` and ``draw_answers.py`` bring the texts, ``measure.py`` their entropies, ``mark_top.py`` marks the top ρ.
``summary.py`` (with ``parts_of_text.py``) and ``compare.py`` read it, ``plots.py`` and ``results.py`` show it.
"""
