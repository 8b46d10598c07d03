"""The command line of hfkd."""
