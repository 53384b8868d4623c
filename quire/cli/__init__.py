"""The command line: one file a command: parse, call the library, print. To add one: a file, and a line in main.py."""
