"""A reporter that remembers what is said."""

from sdlora.training.progress import Reporter


class Notes(Reporter):
    """Keeps what is said and warned of, in `lines`."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say
