"""Training and evaluation data: from the hub or from local files into verl's parquet.

``sources.py`` describes the data sets, ``read.py`` brings their rows to the same columns of text, ``prepare.py`` cleans
and writes them, ``template.py`` has the text around a question. Needs the extra ``data``, which verl brings as well.
"""
