"""The commands ``plan`` and ``doctor``: they examine a run before it starts.

=================================  =====================================================================================
file                               what it does
=================================  =====================================================================================
``plan.py``, ``tables.py``         ``entropy-fork plan``: all steps in their order; the printed tables
``compose.py``                     composes the config of a command line
``launcher.py``                    runs the checks that ``main_ppo`` makes at its start
``run_shape.py``                   what preflight knows of a config, frozen and typed
``read_shape.py``                  reads that from the config, with the typed reader of ``config_values.py``
``problems.py``                    what verl would report late or never, in ``problems_of_batches.py`` and
                                   ``problems_of_accelerators.py``
``step.py``                        counts sequences, steps and tokens
``model_shape.py``                 the sizes of a model, without its weights
``memory.py``, ``logits.py``       formulas for bytes
``add_up.py``, ``fits.py``         puts a run into the formulas; compares the results with an accelerator's memory
``notes.py``                       what the numbers leave out
``doctor.py``                      ``entropy-fork doctor``; tables in ``doctor_tables.py``
``workers.py``, ``probe.py``       asks Ray's workers; what each process answers
=================================  =====================================================================================
"""
