"""One HTML file to look at: coloured tokens, the analyses' figures, training curves. See docs/guide/report.md.

``page.py`` puts it together; ``answers.py`` packs the tokens for ``page.js``, which shows one answer at a time.
"""
