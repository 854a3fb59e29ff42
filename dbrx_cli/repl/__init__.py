"""The chat: a loop that reads a line, obeys a command or asks the model, and shows the reply."""
