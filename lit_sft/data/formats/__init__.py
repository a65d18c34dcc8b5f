"""Row of any known format -> `Conversation`."""
