"""What the tests share: found as ``helpers`` by pytest (``pythonpath``), and by the processes that tests start."""
