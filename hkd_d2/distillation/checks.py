"""Refusals of config values, as one sentence each."""


def one_of(key: str, value: str, known: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``known``; a ValueError names the config key otherwise."""
    if value not in known:
        raise ValueError(f"{key} is '{value}'; choose from {', '.join(known)}.")
    return value
