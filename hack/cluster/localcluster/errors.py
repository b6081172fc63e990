"""The one exception of the local cluster: a message for the person at the terminal."""


class ClusterError(Exception):
    """Say what failed and what to do; the command line prints the message and exits with 1."""
