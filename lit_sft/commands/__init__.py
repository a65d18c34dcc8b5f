"""The commands that Lightning does not have: preview, doctor, export, compare."""
