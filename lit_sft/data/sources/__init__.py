"""Files, directories, hub ids and mixtures -> rows."""
