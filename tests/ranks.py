"""Several processes that work as one, as torchrun starts them, from a server that has imported everything."""

import multiprocessing
import os
import socket
import traceback

WAIT_S = 170
PRELOAD = ["torch", "torch.distributed.tensor", "transformers", "torchrl_maxmin.trainers.lm_ppo"]


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
