"""Conversations with a model, for people: the terminal, the chat page and whatever else lets somebody talk share this room."""
