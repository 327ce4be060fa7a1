"""The one exception that means "the user can mend this".

Everything a person can get wrong (a config key, a path, a column name) is
raised as `ConfigError` with one line that names the value, the rule and the
remedy. Scripts under `launch/` print that line on rank 0 and exit with code 2;
anything else is a bug and keeps its traceback.
"""


class ConfigError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy."""
