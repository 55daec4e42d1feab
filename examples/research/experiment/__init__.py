"""Train on several choices of tokens with several seeds each, in stock verl's main_ppo, and compare them by seed.

``arms`` says what is compared, ``tasks`` on what. ``runs`` makes the runs, ``results`` keeps their curves in CSV files.
``statistics`` has the intervals, ``comparison`` what is computed of the runs, ``page`` writes docs/lab/evidence.md and
its plots. ``power`` says how many seeds show a difference. ``python -m examples.research.experiment --help`` lists the
commands.
"""
