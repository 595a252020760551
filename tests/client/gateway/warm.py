"""Flower's executor of the ClientApp, but a message's process is a copy of this one, which has imported Flower before.

What runs in it is Flower's own. A process that begins with nothing takes a second of a processor for every message.
"""

import os
import sys
import time

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

import common.contract  # noqa: F401 (for the copies)

_POLL_SECONDS = 0.05


def main(address: str) -> None:
    """Execute messages of the SuperNode at an address, for ever."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    again = make_simple_http_retry_invoker()
    client = RuntimeHttpClient.from_server_address(address, True, None, [version], retry_invoker=again)
    while True:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.token:
            if os.fork() == 0:
                try:
                    run_clientapp(address, found.token, insecure=True)
                finally:
                    os._exit(0)
            os.wait()
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
