"""Where workers run and who starts them: one contract (`base.py`), one file or two for each world."""
