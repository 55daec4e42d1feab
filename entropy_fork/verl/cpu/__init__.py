"""verl on a machine without an accelerator. Active with ``VERL_PLATFORM=cpu`` alone."""
