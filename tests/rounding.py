"""How far float32 may be off, so that no test depends on the processor it runs on."""

EPS = 2.0**-23  # of float32


def float32_bound(largest, roundings=16):
    """The error of a sum of products whose terms are as large as ``largest``, after so many roundings of it.

    A matrix product, a softmax or a mean adds its terms in an order that is the processor's; what differs is
    a few roundings of its largest term.
    """
    return roundings * EPS * max(1.0, float(abs(largest)))
