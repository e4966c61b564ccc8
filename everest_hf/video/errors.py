"""The one error of a video that cannot be read."""

from ..files import printable


class VideoError(ValueError):
    """A video that cannot be read: `path` names it, `reason` says why, the message is both in one printable line."""

    def __init__(self, path, reason: str | None = None):
        if reason is None:
            # A DataLoader re-raises a worker's exception with its whole traceback as the one argument; the last
            # line of that is our own message.
            last_line = str(path).strip().splitlines()[-1]
            path, _, reason = last_line.split(f"{type(self).__name__}: ", 1)[-1].partition(": ")
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(printable(f"{self.path}: {self.reason}"))

    def __reduce__(self):
        return type(self), (self.path, self.reason)


class NotKeptError(VideoError):
    """A prepared video does not have the frames that a clip takes."""
