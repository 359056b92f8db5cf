"""What a user can get wrong. Every message says what is wrong, where, with the value seen, and what to do."""


class SdloraError(Exception):
    """Anything the person at the terminal can fix; the command line prints the message and exits with code 2."""


class ConfigError(SdloraError):
    """A setting is unknown, out of range or contradicts another; carries every problem found at once."""


class DatasetError(SdloraError):
    """The image folder holds nothing usable, or a picture or caption cannot be read."""


class ModelError(SdloraError):
    """The base model is missing, unreachable, incomplete or of a family that is not supported."""


class LoraFileError(SdloraError):
    """A LoRA file is damaged, is in another format, or does not fit the base model."""


class TrainingError(SdloraError):
    """Training cannot go on: the loss is not finite, the disk is full, or a run cannot be resumed."""


class DiskFullError(TrainingError):
    """A file could not be written because the disk, or what the user may have of it, is full."""
