"""Files, directories, hub ids and mixtures to rows."""
