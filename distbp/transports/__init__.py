"""What moves bytes between hosts: one contract (`base.py`), one file for each world."""
