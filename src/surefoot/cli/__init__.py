"""The command line: parse, call, print; the exit code is the verdict."""
