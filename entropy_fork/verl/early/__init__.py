"""Find, before Ray starts, mistakes that verl would notice only after that, or never.

A run that names a reward, an estimator, a logger or a file which is not there dies minutes later, and often with an
error that names something else. ``entropy-fork plan`` and ``doctor`` look for all of it in any command line. The
launcher does so in ``main_ppo``, for a run that asks for something of ours: a program of the user's own may read the
keys in its own way.

=================  =====================================================================================================
file               what it looks at
=================  =====================================================================================================
``look.py``        all of it
``names.py``       estimator, loss, rollout, trainer, reward manager and resume mode: names that somebody registered
``numbers.py``     keys that verl counts with
``loggers.py``     the packages and the logins of ``trainer.logger``
``rows.py``        reads the first row of each data file, and the data sources
``files.py``       data files, the checkpoint to go on from, and files with code
``reward.py``      the reward of each data source, the reward function and its arguments, the prompt's instruction
``one_answer.py``  runs in a process of its own: scores one answer with the reward function
=================  =====================================================================================================
"""
