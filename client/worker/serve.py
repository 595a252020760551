"""The worker as a gRPC server on a Unix socket: one message at a time, and a process that ends when one hangs."""

import os
import signal
import socket as socketlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from flwr.app import Error, RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.worker.wire import CHANNEL, METHOD, SERVICE, pack_answer, unpack_question
from common.contract import Kind
from common.errors import NotPreparedError

__all__ = ["serve", "serving"]

#: Calls at once: one that is answered, one that waits, and questions about the worker's health.
_CALLS = 4

Answer = Callable[[Kind, RecordDict, dict[str, object]], RecordDict | Error]


def serve(site: Path, socket: Path, approvals: Path | None = None) -> None:
    """Serve a site's data until SIGTERM or SIGINT.

    Parameters
    ----------
    site : Path
        The site's folder. What the ClientApp says about folders does not count.
    socket : Path
        In a folder that nobody else can enter; it is made where it is missing.
    approvals : Path or None
        The folder of the site's gateway: only studies that were approved there are answered. None is the site's own
        folder, where it has a gateway; without one, any study is answered.

    Raises
    ------
    NotPreparedError
        The socket's folder is open to others, the socket cannot be there, or ``approvals`` is no gateway's folder.
    """
    from client.answers import answer  # with PyTorch: once for all messages

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    # A message that is not answered by its end holds up all others: whoever supervises this process starts another.
    node = {"site": str(site)}
    if approvals is not None or os.path.isdir(site / "gateway" / "approvals"):
        node["approvals"] = str(_gateways(approvals or site))
    with serving(socket, lambda kind, content, config: answer(kind, content, config, node), hung=lambda: os._exit(1)):
        ended.wait()
        socket.unlink(missing_ok=True)
        os._exit(0)  # at once: what is being computed is lost, as with any end of this process


@contextmanager
def serving(socket: Path, answer: Answer, hung: Callable[[], object]) -> Iterator[None]:
    """Serve while the context lasts.

    Parameters
    ----------
    socket : Path
        Where.
    answer : callable
        Called in one thread, with one message at a time.
    hung : callable
        Called when a message is being answered for longer than its answer is of use.
    """
    _prepare(socket)
    # One thread for all messages: PyTorch keeps helpers for each thread that computes.
    one = ThreadPoolExecutor(1)
    mine = threading.Lock()

    def handle(question: bytes, context: grpc.ServicerContext) -> bytes:
        left = context.time_remaining()
        if not mine.acquire(timeout=-1 if left is None else left):
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "")
        try:
            if not context.is_active():  # who asked has gone, and the patients' budget is not spent for nobody
                context.abort(grpc.StatusCode.CANCELLED, "")
            future = one.submit(lambda: pack_answer(answer(*unpack_question(question))))
            return future.result(context.time_remaining())
        except TimeoutError:
            hung()
            raise
        finally:
            mine.release()

    handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.unary_unary_rpc_method_handler(handle)})
    state = health.HealthServicer()
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.server(ThreadPoolExecutor(_CALLS), [handler], options=CHANNEL)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError:
        raise NotPreparedError(f"nothing can listen at {socket}: a path has at most 107 bytes") from None
    socket.chmod(0o660)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
        one.shutdown(wait=False)


def _gateways(folder: Path) -> Path:
    approvals = folder / "gateway" / "approvals"  # none yet: nothing was approved
    try:
        if folder.is_dir() and (not approvals.exists() or os.access(approvals, os.R_OK | os.X_OK)):
            return folder.resolve()
    except OSError:
        pass
    raise NotPreparedError(
        f"the approvals in {folder} cannot be read: name the folder that the gateway has as --site, and run the worker "
        "as a user that may read there"
    )


def _prepare(socket: Path) -> None:
    folder = socket.parent
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    if folder.stat().st_mode & 0o007:
        raise NotPreparedError(f"others can enter {folder}, and whoever reaches the worker can ask it: chmod 0700 it")
    with socketlib.socket(socketlib.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(socket))
        raise NotPreparedError(f"a worker listens at {socket} already")
    socket.unlink(missing_ok=True)  # of a worker that was killed
