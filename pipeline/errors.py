"""The errors that are addressed to users."""


class UserError(Exception):
    """Something the user can mend: one line with the value, the rule and the remedy. Exit status 2, no traceback."""


class ProcessKilledError(Exception):
    """One of the processes that train a stage together was ended by a signal: a line says which, and what to do."""


class StageInterrupted(Exception):  # noqa: N818 - a request that was honoured, not a fault
    """A stage stopped at a step boundary on request; its checkpoint is written and the same command resumes it."""
