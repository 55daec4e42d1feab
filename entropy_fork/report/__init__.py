"""One HTML file to look at: coloured tokens, figures of the analyses, training curves. See docs/guide/report.md.

``page.py`` puts it together. ``packed_answers.py`` packs the tokens for ``page.js``, which shows one answer at a time.
``steps.py`` and ``curves.py`` read what a training run wrote, and ``figures.py`` draws in the two styles of the page.
"""
