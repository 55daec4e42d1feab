"""Code that the tests share. pytest (``pythonpath``) and the processes that tests start import it as ``helpers``."""
