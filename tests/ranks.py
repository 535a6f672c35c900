"""Several processes that work as one, as torchrun starts them, from a server that has imported everything."""

import multiprocessing
import os
import socket
import traceback
from collections import Counter

WAIT_S = 900  # processors are shared
PRELOAD = ["torch", "torch.distributed.tensor", "transformers", "torchrl_maxmin.trainers.lm_ppo"]
#: functions of torch.distributed: their kind, and the bytes that all have in the end, or that are summed
CALLS = {
    "broadcast_object_list": ("broadcast", lambda *_: 0),  # pickled
    "all_gather": ("all_gather", lambda parts, *_: sum(part.nbytes for part in parts)),
    # shards: by one name before torch 2.13, by the other since
    "all_gather_into_tensor": ("all_gather", lambda output, *_: output.nbytes),
    "all_gather_single": ("all_gather", lambda output, *_: output.nbytes),
    "all_reduce": ("all_reduce", lambda value, *_: value.nbytes),
    "reduce_scatter_tensor": ("reduce_scatter", lambda output, value, *_: value.nbytes),
    "reduce_scatter_single": ("reduce_scatter", lambda output, value, *_: value.nbytes),
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(rank, world, port, queue, function, arguments):
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # stages take it, one after another
    try:
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


def on_ranks(world, function, *arguments):
    """Call a function, importable by name, in every process; returns what each of them returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_run, args=(rank, world, port, queue, function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=WAIT_S) for _ in ranks]
    for process in ranks:
        process.join(timeout=WAIT_S)
    errors = [error for _, _, error in results if error]
    assert not errors, "\n".join(errors)
    return [value for _, value, _ in sorted(results, key=lambda result: result[0])]


def saved_parameters(path):
    """The tensors of a file, but for the biases of GPT-2's keys.

    Their gradient is 0, and Adam steps on its rounding.
    """
    import torch
    from safetensors.torch import load_file

    state = load_file(path)
    for name, value in state.items():
        if name.endswith("c_attn.bias"):
            state[name] = torch.cat([value.chunk(3)[i] for i in (0, 2)])
    return state


def assert_same_parameters(found, expected, bar, elementwise=False):
    """Hold two files of tensors against each other: by tensor its root mean square, or each element.

    Where a gradient is nearly 0, Adam steps on its rounding, which is another on another processor.
    """
    one, other = saved_parameters(found), saved_parameters(expected)
    assert one.keys() == other.keys()
    for name, value in other.items():
        difference = (one[name].double() - value.double()).abs()
        error = difference.max() if elementwise else difference.square().mean().sqrt()
        assert error <= bar, f"{found}: {name}"


def count_calls(function, arguments):
    """Calls and bytes by kind of each of some calls of a function."""
    import torch.distributed as dist

    counts, sizes = Counter(), Counter()

    def counting(kind, size, function):
        def call(*arguments, **options):
            counts[kind] += 1
            sizes[kind] += size(*arguments, *options.values())
            return function(*arguments, **options)

        return call

    for name, (kind, size) in CALLS.items():
        if hasattr(dist, name):
            setattr(dist, name, counting(kind, size, getattr(dist, name)))
    found = []
    for argument in arguments:
        counts.clear()
        sizes.clear()
        function(argument)
        found.append({kind: (counts[kind], sizes[kind]) for kind in dict(CALLS.values())})
    return found
