"""A row of any known format to a `Conversation`."""
