"""What a call must at least move and compute: every input read once, every output written once.

One function an operator. Sizes are those of the operators' docstrings, ``itemsize`` the bytes of an input's
element. Outputs are float32, ``argmin`` and the token ids int64, flags one byte. An exponential or a
logarithm counts as one operation. The sum of both directions is what a forward and a backward pass need
together: the inputs are read twice, because the loss lies between the passes.
"""

from typing import Literal, NamedTuple

Direction = Literal["forward", "backward", "both"]


class Floor(NamedTuple):
    """Bytes to move and floating-point operations to do."""

    bytes: int
    flops: int

    def __add__(self, other: tuple) -> "Floor":
        return Floor(self.bytes + other[0], self.flops + other[1])


def _pick(direction: Direction, forward: Floor, backward: Floor) -> Floor:
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def em(direction: Direction, pairs: int, groups: int, users: int, itemsize: int) -> Floor:
    """Read chosen and rejected, offsets and prior; write responsibilities and log-likelihood.

    Backward: read chosen, rejected, responsibilities and the gradient of each user; write two gradients.
    Operations per pair and group: margin, exponential, ``1 +``, product, ``min``, its sum; backward: margin,
    three of the sigmoid, product, sign.
    """
    scores = 2 * pairs * groups * itemsize
    results = 4 * users * groups + 4 * users
    forward = Floor(scores + 8 * (users + 1) + 4 * groups + results, 6 * pairs * groups)
    return _pick(direction, forward, Floor(2 * scores + results, 6 * pairs * groups))


def heads(direction: Direction, rows: int, width: int, num_heads: int, itemsize: int) -> Floor:
    """Read hidden, weight and bias; write rewards, minimum, argmin and softmin.

    Backward through the minimum: read hidden, weight, argmin and the gradient of each row; write the
    gradients of hidden, weight and bias. One product of matrices forward, two backward.
    """
    matrices = (rows + num_heads) * width * itemsize
    bias, product = num_heads * itemsize, 2 * rows * width * num_heads
    forward = Floor(matrices + bias + 4 * rows * num_heads + 16 * rows, product)
    return _pick(direction, forward, Floor(2 * matrices + bias + 12 * rows, 2 * product))


def gae(direction: Direction, batch: int, steps: int, columns: int, itemsize: int) -> Floor:
    """Read reward, value, next value and two flags a step; write advantage and value target. No backward."""
    elements = batch * steps * columns
    forward = Floor(3 * elements * itemsize + 2 * batch * steps + 2 * 4 * elements, 6 * elements)
    return _pick(direction, forward, Floor(0, 0))


def token_gae(direction: Direction, batch: int, steps: int, groups: int, itemsize: int) -> Floor:
    """Read rewards, value, mask and two log-probabilities; write as above, the weighted sum and moments.

    There are ``groups`` + 1 columns, the last of which is the penalty. The group weights are float32.
    """
    tokens, columns = batch * steps, groups + 1
    read = (batch * groups + tokens * columns + 2 * tokens) * itemsize + tokens + 4 * groups
    written = 2 * 4 * tokens * columns + 4 * tokens + 12
    forward = Floor(read + written, 6 * tokens * columns + 2 * tokens * columns + 4 * tokens)
    return _pick(direction, forward, Floor(0, 0))


def log_probs(direction: Direction, rows: int, width: int, vocabulary: int, itemsize: int) -> Floor:
    """Read hidden, lm_head and targets; write log-probabilities. The logits need not leave the chip.

    Backward: read the same and the gradient of each token; write the gradients of hidden and lm_head. One
    product of matrices forward, two backward; what recomputes the logits does a third.
    """
    matrices, product = (rows + vocabulary) * width * itemsize, 2 * rows * width * vocabulary
    forward = Floor(matrices + 8 * rows + 4 * rows, product)
    return _pick(direction, forward, Floor(2 * matrices + 8 * rows + 4 * rows, 2 * product))
