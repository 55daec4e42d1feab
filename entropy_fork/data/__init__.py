"""Training and evaluation data: from the hub or from local files into verl's parquet.

``sources.py`` says what the data sets look like, ``read.py`` brings them to two columns of text, ``prepare.py`` cleans
and writes them, ``template.py`` is the text around a question. Needs the extra ``data`` (verl brings it along as well).
"""
