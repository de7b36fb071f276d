"""A completion's text piece by piece, while it is being sampled."""


class TextStream:
    """Pieces of text that joined are the completion's ``text``: none is ever taken back.

    Held back until it is certain: bytes that are not yet a character, and an end that a stop string may begin with.
    """

    def __init__(self, decode, stop=()):
        """decode: token ids to text; stop: stop strings, which are cut from the text."""
        self.decode = decode
        self.stop = stop
        self.sent = 0

    def grow(self, token_ids):
        """The piece that is certain once the completion has these tokens, possibly empty."""
        text = self.decode(token_ids).rstrip("\ufffd")
        certain = len(text)
        for stop in self.stop:
            for start in range(max(0, len(text) - len(stop) + 1), len(text)):
                if stop.startswith(text[start:]):
                    certain = min(certain, start)
        return self._advance(text[:certain])

    def finish(self, text):
        """The last piece, given the whole text of the completion."""
        return self._advance(text)

    def _advance(self, text):
        piece, self.sent = text[self.sent :], max(self.sent, len(text))
        return piece
