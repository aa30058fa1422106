"""The command line: flags and what is true of them, checks, hub ids, one line for an error; without torch."""
