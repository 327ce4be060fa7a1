"""The exceptions that are told in one line, without a traceback.

Everything a person can get wrong (a config key, a path, a column name) is
raised as `ConfigError` with one line that names the value, the rule and the
remedy. Scripts under `launch/` print that line on rank 0 and exit with code 2.
Ranks that lose each other raise `LostError`; each prints its line, exit code 1.
What all ranks have found out together and no run should go on with raises
`StopError` on all of them; rank 0 prints the line, exit code 1.
Anything else is a bug and keeps its traceback.
"""


class ConfigError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy."""


class LostError(RuntimeError):
    """A collective failed, or could not have ended. The message is one line: what was lost, and what to do."""


class StopError(RuntimeError):
    """The run must not go on, and every rank knows it. The message is one line: what, at which step, on which rank."""
