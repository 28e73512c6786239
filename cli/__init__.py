"""The command line: one click group whose commands load their stage only when they are called."""
