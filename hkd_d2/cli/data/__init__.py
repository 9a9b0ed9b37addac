"""The commands ``hkd data ...``, one file each."""
