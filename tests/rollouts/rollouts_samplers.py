"""Samplers that processes of Ray run: they answer with what they have, or end their process."""

import os
import signal
from pathlib import Path

import torch
from tensordict import TensorDict

from torchrl_maxmin.core.errors import UserError


class Adder:
    """Answers a number with the sum of it and the weight; the word die ends its process, once a file."""

    def load(self, weights):
        self.weight = weights[0].clone()

    def sample(self, task):
        number, order = task
        if order == "refuse":
            raise UserError("no such number")
        if order and not Path(order).exists():
            Path(order).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        process = torch.tensor([os.getpid()])
        return TensorDict({"sum": self.weight.reshape(1) + number, "process": process}, [1])
