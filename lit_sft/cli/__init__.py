"""Words to objects: the command line."""
