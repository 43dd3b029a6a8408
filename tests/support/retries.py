"""How often one file may be asked for at most when storage fails: from which tests work out bounds.

What belongs here: the figures of the clients' own retries and of the engine's, each in one place.
They are written down, not imported: a bound taken from the code would follow its mistakes.
"""

from __future__ import annotations

import itertools

# How often a client asks by itself for one thing, until it says that storage fails.
# pyarrow: the AWS SDK's standard retries are three attempts. s3fs: five rounds (its `retries`) of
# five attempts each (botocore's default). obstore: four retries, as we set it up.
TRIES = {"pyarrow": 3, "s3fs": 25, "obstore": 5}


def most_writes(seconds: float) -> int:
    """How often the engine may begin to send one file within so long, if each try fails at once.

    After the first it pauses 0.5 s, then twice as long each time, up to 10 s; jitter takes at most
    half of a pause away.
    """
    pauses = (min(0.5 * 2**n, 10.0) / 2 for n in itertools.count())
    ends = itertools.takewhile(lambda end: end <= seconds, itertools.accumulate(pauses))
    return 1 + sum(1 for _ in ends)


def most_requests(client: str, files: int, seconds: float) -> int:
    """How many requests so many files may cost at most while every one of them fails.

    Each write of a file ends at its first request, which the client repeats. The AWS SDK in pyarrow
    also stops repeating when most of its requests fail: a client has 500 tokens, a repeated request
    costs five, and only a success gives some back.
    """
    writes = files * most_writes(seconds)
    most = writes * TRIES[client]
    return min(most, writes + 100) if client == "pyarrow" else most
