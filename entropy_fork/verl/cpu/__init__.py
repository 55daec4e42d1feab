"""verl on a machine without an accelerator. Active only with ``VERL_PLATFORM=cpu`` in the environment."""
