"""What a user keeps in a module of its own, which other modules import."""

total = 0
names: list[str] = []


class Settings:
    step = 0


def count() -> None:
    global total
    total += 1


def begin() -> None:
    """Forget everything."""
    global total
    total, Settings.step = 0, 0
    names.clear()
