"""How many prompt tokens a reply cost: each computed token is counted once.

This module owns the arithmetic between what an engine reports (so many tokens of a path were
resident, so many were computed) and ``usage.prefilled``. Prefill runs ahead of replies, is
interrupted, and is shared by forks, so tokens are counted per entry when they are computed, and
charged to the first reply whose path they are on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class PrefillAccount:
    """The computed tokens of one conversation's entries, by entry."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}  # entry -> its first tokens whose KV has been computed
        self._unpaid: dict[str, int] = {}  # entry -> tokens computed and not yet charged
        self._claims: dict[str, tuple[int, int]] = {}  # entry -> its tokens that a draft may have
        self._drafted: dict[str, int] = {}  # entry -> tokens of the unpaid ones that a draft had

    def claim(self, entry: str, first: int, last: int) -> None:
        """A draft may have computed the tokens ``[first, last)`` of an entry.

        Those of them that are resident when the entry's path is computed next were computed by it;
        those before ``first`` were computed for somebody else.
        """
        self._claims[entry] = first, last

    def computed(self, path: Iterable[tuple[str, int]], *, reused: int, prompt: int) -> None:
        """The KV of the first ``prompt`` tokens of a path is there, ``reused`` of them was.

        Tokens beyond what we know of were computed by a prefill that was interrupted before it
        could report; tokens before ``reused`` that we knew were not computed again.

        Args:
            path: the entries of the path with the number of their tokens, from the root.
            reused: tokens that were resident when the computation began.
            prompt: tokens that are resident now.
        """
        spans = list(path)
        self._settle_claims(spans, reused)
        known = self._known_prefix(spans) if self._known else reused
        begin, offset = min(known, reused), 0
        for entry, tokens in spans:
            first, last = max(offset, begin), min(offset + tokens, prompt)
            if last > first:
                self._unpaid[entry] = self._unpaid.get(entry, 0) + last - first
            if last > offset:
                self._known[entry] = max(self._known.get(entry, 0), last - offset)
            offset += tokens

    def sampled(self, entry: str, tokens: int) -> None:
        """The first ``tokens`` tokens of a reply are resident, computed while it was sampled."""
        self._known[entry] = max(self._known.get(entry, 0), tokens)

    def known(self, path: Iterable[tuple[str, int]]) -> int:
        """The first tokens of a path whose KV has been computed."""
        return self._known_prefix(path)

    def charge(self, path: Iterable[str]) -> tuple[int, int]:
        """The tokens computed on a path and not charged yet; they are now.

        Returns:
            All of them, and how many of these a draft had computed.
        """
        entries = list(path)
        unpaid = sum(self._unpaid.pop(entry, 0) for entry in entries)
        return unpaid, sum(self._drafted.pop(entry, 0) for entry in entries)

    def _settle_claims(self, spans: Iterable[tuple[str, int]], reused: int) -> None:
        offset = 0
        for entry, tokens in spans if self._claims else ():
            first, last = self._claims.pop(entry, (0, 0))
            drafted = min(last, tokens, reused - offset) - first
            if drafted > 0:
                self._known[entry] = max(self._known.get(entry, 0), first)
                self._drafted[entry] = self._drafted.get(entry, 0) + drafted
            offset += tokens

    def _known_prefix(self, spans: Iterable[tuple[str, int]]) -> int:
        total = 0
        for entry, tokens in spans:
            known = min(self._known.get(entry, 0), tokens)
            total += known
            if known < tokens:
                break
        return total
