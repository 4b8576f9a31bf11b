"""What this machine can do, and what distbp reaches on it: the measurements behind `distbp bench`.

One file for each measurement, imported when it is asked for.  Training uses nothing of this.
"""
