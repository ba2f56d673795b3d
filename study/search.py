"""The search for an arm's learning rate: on a ladder of rates, by where its runs of one seed ended."""

FIRST = 3  # so many rates in the middle of the ladder are tried first


def best_of(ends: dict[str, float]) -> str:
    """Return the rate that ended best; of equal ones the lowest."""
    return max(sorted(ends, key=float), key=ends.get)


def rates_to_try(ladder: tuple[str, ...], ends: dict[str, float]) -> tuple[str, ...]:
    """Return the rates that were tried and those to try next.

    As long as the best lies at an end of those that were tried, the next one beyond is tried too, if the ladder has one.
    """
    low = max(0, (len(ladder) - FIRST) // 2)
    high = min(low + FIRST, len(ladder))
    while (tried := ladder[low:high]) and all(rate in ends for rate in tried):
        best = best_of({rate: ends[rate] for rate in tried})
        if best == tried[0] and low > 0:
            low -= 1
        elif best == tried[-1] and high < len(ladder):
            high += 1
        else:
            break
    return ladder[low:high]


def known_best(ladder: tuple[str, ...], ends: dict[str, float]) -> str | None:
    """Return the best rate; None until all that are to be tried were."""
    tried = rates_to_try(ladder, ends)
    return best_of({rate: ends[rate] for rate in tried}) if all(rate in ends for rate in tried) else None
