"""The command line: one file per command; each builds a configuration, calls one function, prints one result."""
